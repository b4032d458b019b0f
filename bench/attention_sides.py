"""Decode attention over pages as we and plain torch compute it, alone and with the new tokens' rotation and write."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fastgrpo_kernels import PagedLayout, decode_attention, paged_attention
from rope_sides import rotate
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """A decode step's queries and cache: groups of rows that share a prefix. B rows, P prefixes, L tokens of room."""

    query: Tensor
    """[B, Hq, D]"""
    key_cache: Tensor
    """[pages, page_size, Hkv, D]"""
    value_cache: Tensor
    """The same."""
    layout: PagedLayout
    grouped: bool | None
    """What `paged_attention` is asked for."""
    dense_keys: Tensor
    """[B, Hkv, L, D]: each row's own copy of all it reads, for plain torch."""
    dense_values: Tensor
    """The same."""
    counts: Tensor
    """[B, 1, 1, L] bool: which of those tokens exist."""

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def query_heads(self) -> Tensor:
        """[B, Hkv, Hq / Hkv, D]: the query heads of a KV head as its queries."""
        return self.query.unflatten(1, (self.key_cache.shape[2], -1))


@dataclass(frozen=True)
class DecodeInputs:
    """Attention's inputs, and the newest token of each row, which `attention` counts and the caches do not hold yet."""

    attention: AttentionInputs
    key: Tensor
    """[B, Hkv, D], like the query not rotated yet."""
    value: Tensor
    """The same."""
    cos: Tensor
    """[B, D] float32"""
    sin: Tensor
    """[B, D] float32"""
    slots: Tensor
    """[B] int64: their places in the pages."""
    places: Tensor
    """[B] int64: their places in the dense copies."""


@dataclass(frozen=True)
class AttentionSide:
    """One implementation. Decoding has no gradients: both passes are the one there is."""

    name: str
    apply: Callable[[Any], Tensor]
    """From attention's inputs, or a decode step's, to [B, Hq, D]."""
    forward_only: bool = False

    def forward(self, inputs: Any) -> Tensor:
        return self.apply(inputs)

    def forward_backward(self, inputs: Any) -> Tensor:
        return self.apply(inputs)


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


def make_attention_inputs(
    shape: AttentionShape, dtype: torch.dtype, device: str, grouped: bool | None
) -> AttentionInputs:
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
    dense_keys, dense_values = (cache[pages].flatten(1, 2).transpose(1, 2).contiguous() for cache in (keys, values))
    exists = [
        torch.arange(count * size, device=device) < lens[:, None]
        for count, lens in ((prefix_pages, prefix_lens[ids]), (suffix_pages, suffix_lens))
    ]
    layout = PagedLayout(
        suffix_tables.int(), suffix_lens.int(), prefix_tables.int(), prefix_lens.int(), ids.int(), bounds.int()
    )
    query = torch.randn(shape.rows, shape.heads, shape.width, device=device).to(dtype)
    counts = torch.cat(exists, dim=1)[:, None, None]
    return AttentionInputs(query, keys, values, layout, grouped, dense_keys, dense_values, counts)


def make_decode_inputs(shape: AttentionShape, dtype: torch.dtype, device: str) -> DecodeInputs:
    """The same, with random new tokens."""
    inputs = make_attention_inputs(shape, dtype, device, grouped=None)
    key, value = torch.randn(2, shape.rows, shape.kv_heads, shape.width, device=device).to(dtype)
    angles = torch.rand(shape.rows, shape.width // 2, device=device).mul_(6.28).repeat(1, 2)
    last = shape.suffix_lens.to(device) - 1
    tables, size = inputs.layout.suffix_tables.long(), shape.page_size
    pages = tables.gather(1, (last // size)[:, None]).squeeze(1)
    places = -(-shape.prefix // size) * size + last
    return DecodeInputs(inputs, key, value, angles.cos(), angles.sin(), pages * size + last % size, places)


def exact_decode(inputs: DecodeInputs) -> Tensor:
    """[B, Hq, D] float64."""
    names = ("query", "dense_keys", "dense_values")
    exact = replace(inputs.attention, **{name: getattr(inputs.attention, name).double() for name in names})
    return exact_attention(_with_new_tokens(replace(inputs, attention=exact)))


def _with_new_tokens(inputs: DecodeInputs) -> AttentionInputs:
    """Rotates, and writes the dense copies, in their dtype."""
    attention, dtype = inputs.attention, inputs.attention.query.dtype
    cos, sin = inputs.cos.to(dtype), inputs.sin.to(dtype)
    rows = torch.arange(len(inputs.key), device=inputs.key.device)
    attention.dense_keys[rows, :, inputs.places] = rotate(inputs.key.to(dtype), cos, sin)
    attention.dense_values[rows, :, inputs.places] = inputs.value.to(dtype)
    return replace(attention, query=rotate(attention.query, cos, sin))


def exact_attention(inputs: AttentionInputs) -> Tensor:
    """[B, Hq, D] float64."""
    scores = inputs.query_heads.double() @ inputs.dense_keys.double().transpose(-1, -2) * inputs.scale
    weights = scores.masked_fill(~inputs.counts, -torch.inf).softmax(dim=-1)
    return (weights @ inputs.dense_values.double()).flatten(1, 2)


def attention_errors(result: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative, Frobenius norm."""
    return {"output": float(torch.linalg.norm(result.double() - exact) / torch.linalg.norm(exact))}


def attention_sides() -> list[AttentionSide]:
    """Ours, and torch's attention over each row's own dense copy of its keys, which it is given for nothing."""
    return [AttentionSide("fastgrpo", _ours), AttentionSide("torch", _dense)]


def decode_sides() -> list[AttentionSide]:
    """Ours, and torch's rotation, write and attention over dense copies."""
    return [AttentionSide("fastgrpo", _our_decode), AttentionSide("torch", lambda x: _dense(_with_new_tokens(x)))]


def _our_decode(inputs: DecodeInputs) -> Tensor:
    attention = inputs.attention
    return decode_attention(
        attention.query,
        inputs.key,
        inputs.value,
        inputs.cos,
        inputs.sin,
        attention.key_cache,
        attention.value_cache,
        inputs.slots,
        attention.layout,
        scale=attention.scale,
    )


def _ours(inputs: AttentionInputs) -> Tensor:
    return paged_attention(
        inputs.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.layout,
        scale=inputs.scale,
        grouped=inputs.grouped,
    )


def _dense(inputs: AttentionInputs) -> Tensor:
    return F.scaled_dot_product_attention(
        inputs.query_heads, inputs.dense_keys, inputs.dense_values, attn_mask=inputs.counts, scale=inputs.scale
    ).flatten(1, 2)
