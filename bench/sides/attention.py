"""Decode attention over pages as we and plain torch compute it, alone and with the new tokens' rotation and write."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastgrpo_kernels import PagedLayout, decode_attention, paged_attention
from torch import Tensor

from sides import Op, Results, Side, Work, dtype_name, tolerance_of
from sides.rope import rotate


@dataclass(frozen=True)
class AttentionShape:
    """`rows` in groups of `group` on a prefix each, with at most `suffix` tokens of their own."""

    rows: int
    group: int
    prefix: int
    suffix: int
    heads: int = 12
    kv_heads: int = 2
    width: int = 128
    page_size: int = 16

    @property
    def prefix_lens(self) -> Tensor:
        """[P]: none alike, so that pages are partly filled."""
        return self.prefix - torch.arange(self.rows // self.group) % 3

    @property
    def suffix_lens(self) -> Tensor:
        """[B]"""
        return self.suffix - torch.arange(self.rows) % min(7, self.suffix)

    def read_bytes(self, dtype: torch.dtype) -> int:
        """Least traffic: each prefix once, and each row's own tokens."""
        tokens = int(self.prefix_lens.sum() + self.suffix_lens.sum())
        return 2 * tokens * self.kv_heads * self.width * dtype.itemsize


class AttentionInputs(NamedTuple):
    """A decode step's queries and cache: B rows in groups that share a prefix, at most L tokens each.

    The newest token of a row is counted in `layout`, and `decode_attention` writes it; the caches hold another there.
    """

    query: Tensor
    """[B, Hq, D]"""
    key_cache: Tensor
    """[pages, page_size, Hkv, D]"""
    value_cache: Tensor
    """The same."""
    layout: PagedLayout
    dense_keys: Tensor
    """[B, Hkv, L, D]: each row's own copy of all it reads, for plain torch."""
    dense_values: Tensor
    """The same."""
    exists: Tensor
    """[B, 1, 1, L] bool: which of those tokens exist."""
    key: Tensor
    """[B, Hkv, D]: of the newest token, like the query not rotated yet."""
    value: Tensor
    """The same."""
    cos: Tensor
    """[B, D] float32"""
    sin: Tensor
    """[B, D] float32"""
    slots: Tensor
    """[B] int64: the newest token's place in the pages."""
    places: Tensor
    """[B] int64: its place in the dense copies."""

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)


def attention_op(shape: AttentionShape, dtype: torch.dtype, device: str, grouped: bool | None = None) -> Op:
    """`paged_attention` of a decode step, one layer. Plain torch gets a dense copy of every row's keys for nothing."""
    way = {None: "", True: " grouped", False: " row by row"}[grouped]

    def ours(x: AttentionInputs) -> Results:
        paged = paged_attention(x.query, x.key_cache, x.value_cache, x.layout, scale=x.scale, grouped=grouped)
        return {"output": paged}

    return Op(
        name="attention",
        shape=f"B={shape.rows} G={shape.group} prefix={shape.prefix} own={shape.suffix} "
        f"{shape.heads}/{shape.kv_heads}x{shape.width} {dtype_name(dtype)}{way}",
        make_inputs=lambda: _inputs(shape, dtype, device),
        sides=lambda: [Side("fastgrpo", ours), Side("torch", _dense)],
        exact=lambda x: _eager(_doubled(x)),
        tolerance=tolerance_of(dtype),
        work=Work(float(shape.read_bytes(dtype)), "copy"),
    )


def decode_op(shape: AttentionShape, dtype: torch.dtype, device: str) -> Op:
    """`decode_attention`: the same with the new tokens' rotation and write, as a decode step calls it."""
    return replace(
        attention_op(shape, dtype, device),
        name="decode_attention",
        sides=lambda: [Side("fastgrpo", _our_step), Side("torch", lambda x: _dense(_with_new_tokens(x)))],
        exact=lambda x: _eager(_with_new_tokens(_doubled(x))),
    )


def _inputs(shape: AttentionShape, dtype: torch.dtype, device: str) -> AttentionInputs:
    """Random queries, keys and values; pages in random order."""
    torch.manual_seed(0)
    prefixes, size = shape.rows // shape.group, shape.page_size
    prefix_pages, suffix_pages = -(-shape.prefix // size), -(-shape.suffix // size)
    total = prefixes * prefix_pages + shape.rows * suffix_pages
    order = torch.randperm(total).to(device)
    prefix_tables = order[: prefixes * prefix_pages].view(prefixes, prefix_pages)
    suffix_tables = order[prefixes * prefix_pages :].view(shape.rows, suffix_pages)
    keys, values = torch.randn(2, total, size, shape.kv_heads, shape.width, device=device).to(dtype)
    prefix_lens, suffix_lens = shape.prefix_lens.to(device), shape.suffix_lens.to(device)
    ids = torch.arange(shape.rows, device=device) // shape.group
    bounds = torch.arange(0, shape.rows + 1, shape.group, device=device)
    pages = torch.cat([prefix_tables[ids], suffix_tables], dim=1)  # [B, pages of a row]
    exists = [
        torch.arange(count * size, device=device) < lens[:, None]
        for count, lens in ((prefix_pages, prefix_lens[ids]), (suffix_pages, suffix_lens))
    ]
    angles = torch.rand(shape.rows, shape.width // 2, device=device).mul_(6.28).repeat(1, 2)
    key, value = torch.randn(2, shape.rows, shape.kv_heads, shape.width, device=device).to(dtype)
    newest = suffix_lens - 1
    return AttentionInputs(
        torch.randn(shape.rows, shape.heads, shape.width, device=device).to(dtype),
        keys,
        values,
        PagedLayout(
            suffix_tables.int(), suffix_lens.int(), prefix_tables.int(), prefix_lens.int(), ids.int(), bounds.int()
        ),
        *(cache[pages].flatten(1, 2).transpose(1, 2).contiguous() for cache in (keys, values)),
        torch.cat(exists, dim=1)[:, None, None],
        key,
        value,
        angles.cos(),
        angles.sin(),
        suffix_tables.gather(1, (newest // size)[:, None]).squeeze(1) * size + newest % size,
        prefix_pages * size + newest,
    )


def _our_step(x: AttentionInputs) -> Results:
    caches = x.key_cache, x.value_cache
    return {
        "output": decode_attention(x.query, x.key, x.value, x.cos, x.sin, *caches, x.slots, x.layout, scale=x.scale)
    }


def _with_new_tokens(x: AttentionInputs) -> AttentionInputs:
    """Rotates, and writes the dense copies, in their dtype."""
    cos, sin = x.cos.to(x.query.dtype), x.sin.to(x.query.dtype)
    rows = torch.arange(len(x.key), device=x.key.device)
    x.dense_keys[rows, :, x.places] = rotate(x.key, cos, sin)
    x.dense_values[rows, :, x.places] = x.value
    return x._replace(query=rotate(x.query, cos, sin))


def _dense(x: AttentionInputs) -> Results:
    """Torch's attention; the query heads of a KV head are its queries."""
    query = x.query.unflatten(1, (x.key_cache.shape[2], -1))  # [B, Hkv, Hq / Hkv, D]
    output = F.scaled_dot_product_attention(query, x.dense_keys, x.dense_values, attn_mask=x.exists, scale=x.scale)
    return {"output": output.flatten(1, 2)}


def _eager(x: AttentionInputs) -> Results:
    query = x.query.unflatten(1, (x.key_cache.shape[2], -1))
    scores = query @ x.dense_keys.transpose(-1, -2) * x.scale
    weights = scores.masked_fill(~x.exists, -torch.inf).softmax(dim=-1)
    return {"output": (weights @ x.dense_values).flatten(1, 2)}


def _doubled(x: AttentionInputs) -> AttentionInputs:
    names = ("query", "dense_keys", "dense_values", "key", "value")
    return x._replace(**{name: getattr(x, name).double() for name in names})
