"""Rotation of queries and keys and the write into the cache, as we and plain torch do it."""

from typing import NamedTuple

import torch
from fastgrpo_kernels import rope_and_cache
from torch import Tensor

from sides import Op, Results, Side, Work, dtype_name

PAGE_SIZE = 16
SIDES = ("fastgrpo", "torch")


class RopeInputs(NamedTuple):
    """One layer's T new tokens, and the slots that their keys and values go to."""

    query: Tensor
    """[T, Hq, D], like key and value a view into one packed tensor."""
    key: Tensor
    """[T, Hkv, D]"""
    value: Tensor
    """[T, Hkv, D]"""
    cos: Tensor
    """[T, D] float32"""
    sin: Tensor
    """[T, D] float32"""
    key_caches: Tensor
    """[sides, pages, page_size, Hkv, D]: a side of its own each, so that none is credited with what another wrote."""
    value_caches: Tensor
    """The same."""
    slots: Tensor
    """[T] int64"""


def rope_op(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> Op:
    """`rope_and_cache` of one layer; of its work each value is read once and written once."""
    return Op(
        name="rope",
        shape=f"T={tokens} {heads}/{kv_heads}x{width} {dtype_name(dtype)}",
        make_inputs=lambda: _inputs(tokens, heads, kv_heads, width, dtype, device),
        sides=lambda: [Side("fastgrpo", _ours), Side("torch", _plain)],
        exact=_exact,
        tolerance=1e-6 if dtype == torch.float32 else 1e-3,
        work=Work(2.0 * tokens * (heads + 2 * kv_heads) * width * dtype.itemsize, "copy"),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, D] by angles [T, D], in the dtype they are all in."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def _inputs(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> RopeInputs:
    """Random tokens at random places of caches that hold NaN elsewhere."""
    torch.manual_seed(0)
    packed = torch.randn(tokens, heads + 2 * kv_heads, width, device=device).to(dtype)
    angles = torch.rand(tokens, width // 2, device=device).mul_(6.28).repeat(1, 2)
    pages = -(-tokens // PAGE_SIZE) + 1
    size = (len(SIDES), pages, PAGE_SIZE, kv_heads, width)
    keys, values = (torch.full(size, torch.nan, dtype=dtype, device=device) for _ in range(2))
    slots = torch.randperm(pages * PAGE_SIZE)[:tokens].to(device)
    return RopeInputs(
        *packed.split([heads, kv_heads, kv_heads], dim=1), angles.cos(), angles.sin(), keys, values, slots
    )


def _caches(inputs: RopeInputs, side: str) -> tuple[Tensor, Tensor]:
    place = SIDES.index(side)
    return inputs.key_caches[place], inputs.value_caches[place]


def _ours(x: RopeInputs) -> Results:
    keys, values = _caches(x, "fastgrpo")
    query = rope_and_cache(x.query, x.key, x.value, x.cos, x.sin, keys, values, x.slots)
    return {"query": query, "key": keys.flatten(0, 1), "value": values.flatten(0, 1)}


def _plain(x: RopeInputs) -> Results:
    cos, sin = x.cos.to(x.query.dtype), x.sin.to(x.query.dtype)
    keys, values = (cache.flatten(0, 1) for cache in _caches(x, "torch"))
    keys.index_copy_(0, x.slots, rotate(x.key, cos, sin))
    values.index_copy_(0, x.slots, x.value)
    return {"query": rotate(x.query, cos, sin), "key": keys, "value": values}


def _exact(x: RopeInputs) -> Results:
    fresh = x._replace(**{name: tensor.double() for name, tensor in x._asdict().items() if name != "slots"})
    empty = torch.full_like(fresh.key_caches, torch.nan)
    return _plain(fresh._replace(key_caches=empty, value_caches=empty.clone()))
