"""Rotation of queries and keys and the write into the cache, as we and plain torch do it, and the exact results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fastgrpo_kernels import rope_and_cache
from torch import Tensor

PAGE_SIZE = 16
SIDES = 2


@dataclass(frozen=True)
class RopeInputs:
    """One layer's new tokens, and the slots that their keys and values go to."""

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


class RopeResult(NamedTuple):
    """Rotated queries, and what the slots then hold."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class RopeSide:
    """One implementation. There are no gradients: both passes are the one there is."""

    name: str
    apply: Callable[[RopeInputs, Tensor, Tensor], Tensor]
    """Writes the given caches, returns the queries."""
    place: int
    """Of its caches among all sides'."""
    forward_only: bool = False

    def forward(self, inputs: RopeInputs) -> RopeResult:
        return self.forward_backward(inputs)

    def forward_backward(self, inputs: RopeInputs) -> RopeResult:
        keys, values = inputs.key_caches[self.place], inputs.value_caches[self.place]
        return RopeResult(self.apply(inputs, keys, values), keys.flatten(0, 1), values.flatten(0, 1))


def make_rope_inputs(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> RopeInputs:
    """Random tokens at random places of caches that hold NaN elsewhere."""
    torch.manual_seed(0)
    packed = torch.randn(tokens, heads + 2 * kv_heads, width, device=device).to(dtype)
    angles = torch.rand(tokens, width // 2, device=device).mul_(6.28).repeat(1, 2)
    pages = -(-tokens // PAGE_SIZE) + 1
    size = (SIDES, pages, PAGE_SIZE, kv_heads, width)
    keys, values = (torch.full(size, torch.nan, dtype=dtype, device=device) for _ in range(2))
    slots = torch.randperm(pages * PAGE_SIZE)[:tokens].to(device)
    query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
    return RopeInputs(query, key, value, angles.cos(), angles.sin(), keys, values, slots)


def exact_rope(inputs: RopeInputs) -> RopeResult:
    """float64."""
    query, key = (rotate(x.double(), inputs.cos.double(), inputs.sin.double()) for x in (inputs.query, inputs.key))
    written = []
    for caches, entries in ((inputs.key_caches, key), (inputs.value_caches, inputs.value.double())):
        flat = torch.full_like(caches[0].flatten(0, 1), torch.nan, dtype=torch.float64)
        written.append(flat.index_copy_(0, inputs.slots, entries))
    return RopeResult(query, *written)


def rope_errors(result: RopeResult, exact: RopeResult) -> dict[str, float]:
    """Relative, Frobenius norm; infinite where a slot was written that should not have been, or the reverse."""
    errors = {}
    for name, got, true in zip(RopeResult._fields, result, exact, strict=True):
        if not torch.equal(got.isnan(), true.isnan()):
            errors[name] = torch.inf
            continue
        true = true.nan_to_num()
        errors[name] = float(torch.linalg.norm(got.double().nan_to_num() - true) / torch.linalg.norm(true))
    return errors


def rope_sides() -> list[RopeSide]:
    """Ours, and plain torch operation by operation."""
    return [RopeSide("fastgrpo", _ours, 0), RopeSide("torch", _plain, 1)]


def _ours(inputs: RopeInputs, keys: Tensor, values: Tensor) -> Tensor:
    return rope_and_cache(inputs.query, inputs.key, inputs.value, inputs.cos, inputs.sin, keys, values, inputs.slots)


def _plain(inputs: RopeInputs, keys: Tensor, values: Tensor) -> Tensor:
    cos, sin = inputs.cos.to(inputs.query.dtype), inputs.sin.to(inputs.query.dtype)
    keys.flatten(0, 1).index_copy_(0, inputs.slots, rotate(inputs.key, cos, sin))
    values.flatten(0, 1).index_copy_(0, inputs.slots, inputs.value)
    return rotate(inputs.query, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, D] by angles [T, D], in the dtype they are all in."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
