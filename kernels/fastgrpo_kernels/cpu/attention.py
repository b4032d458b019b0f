"""Decode attention over a paged KV cache, read in place where possible, and writing rotated keys to it."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.types import PagedLayout

_NOTHING = -1e30
"""Score of a token that does not count. Finite, so that attention to nothing is 0 and not NaN."""
MOST_COPIED = 1 << 15
"""Numbers of a prefix's keys. Where all prefixes have equally many rows, and none is longer, they are read together:
copying one then takes less time than another call of the operator."""
HEADS_TOGETHER = 4
"""KV heads that one product reads; see `_attend_own`."""


def rope_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`fastgrpo_kernels.rope_and_cache`."""
    heads, half = query.shape[1], query.shape[2] // 2
    both = torch.cat((query, key), dim=1)  # [T, Hq + Hkv, D]
    cos, sin = cos[:, None], sin[:, None]
    wide = both.to(torch.promote_types(both.dtype, cos.dtype))
    rotated = wide * cos
    rotated[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    rotated = rotated.to(query.dtype)
    write_cache(rotated[:, heads:], value, key_cache, value_cache, slots)
    return rotated[:, :heads].contiguous()


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Writes keys and values [T, Hkv, D] to their slots [T]; −1: nowhere."""
    if len(slots) and int(slots.amin()) < 0:
        kept = slots >= 0
        slots, key, value = slots[kept], key[kept], value[kept]
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slots, key.to(key_cache.dtype))
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slots, value.to(value_cache.dtype))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`fastgrpo_kernels.paged_attention`: a prefix is read once for all its rows. Reads `layout` on the host, once.

    Cache contents past a length are ignored, even NaN.
    """
    rows, heads, width = query.shape
    if rows == 0:
        return query.new_empty(query.shape)
    kv_heads = key_cache.shape[2]
    queries = query.reshape(rows, kv_heads, heads // kv_heads, width)  # [B, Hkv, R, D]
    if window is not None and (tokens := _last_tokens(layout, key_cache.shape, window)) is not None:
        keys, values = (cache.view(-1, 1, kv_heads, width) for cache in (key_cache, value_cache))
        return _attend(queries, tokens, keys, values, scale, softcap)[0].reshape(rows, heads, width)
    suffixes, prefixes = _plan(layout, key_cache.shape)
    dtype = computing_dtype(query)
    shared, shared_lse = _attend_prefixes(queries, prefixes, key_cache, value_cache, scale, softcap)
    keys, values = suffixes.read(key_cache), suffixes.read(value_cache)
    bias = suffixes.bias(dtype, query.device)
    if kv_heads <= HEADS_TOGETHER:
        merged = _attend_own(queries, keys, values, shared, shared_lse, bias, scale, softcap)
    else:
        split = (x.split(HEADS_TOGETHER, dim=1) for x in (queries, keys, values, shared, shared_lse))
        parts = [_attend_own(q, k, v, out, lse, bias, scale, softcap) for q, k, v, out, lse in zip(*split, strict=True)]
        merged = torch.cat(parts, dim=1)
    return merged.reshape(query.shape).to(query.dtype)


def _attend_prefixes(
    queries: Tensor,
    prefixes: "list[_Prefixes]",
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries [B, Hkv, R, D] to their prefixes and its log-sum-exp [B, Hkv, R]; 0 and −inf without one."""
    found = []
    for start, end, tokens in prefixes:
        members = queries[start:end].unflatten(0, (tokens.shape[0], -1)).transpose(1, 2)  # [N, Hkv, G, R, D]
        part, lse = _attend(members.flatten(2, 3), tokens, key_cache, value_cache, scale, softcap)
        shape = members.shape
        found.append(
            (part.view(shape).transpose(1, 2).flatten(0, 1), lse.view(shape[:4]).transpose(1, 2).flatten(0, 1))
        )
        if end - start == len(queries):
            return found[0]
    shared = queries.new_zeros(queries.shape, dtype=computing_dtype(queries))
    shared_lse = shared.new_full(queries.shape[:3], -math.inf)
    for (start, end, _), (part, lse) in zip(prefixes, found, strict=True):
        shared[start:end], shared_lse[start:end] = part, lse
    return shared, shared_lse


class _Tokens(NamedTuple):
    """Where N sequences' tokens lie in a cache, to be read as [N, Hkv, size, D]."""

    shape: tuple[int, int, int, int]
    """N, Hkv, size, D, where size fits the longest."""
    strides: tuple[int, int, int, int] | None = None
    """A view, read without a copy, if every sequence's pages are consecutive and sequences evenly spaced."""
    offset: int = 0
    pages: Tensor | None = None
    """Otherwise [N · pages of a sequence]."""
    unused: Tensor | None = None
    """[N, size] bool: unused places, if there are any."""
    dead: Tensor | None = None
    """The same as indices into [N · size]."""

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """[N, 1, 1, size]: added to scores, so that unused places count nothing; None if there are none."""
        if self.unused is None:
            return None
        bias = torch.zeros(self.unused.shape, dtype=dtype, device=device)
        return bias.masked_fill_(self.unused, _NOTHING)[:, None, None]

    def read(self, cache: Tensor) -> Tensor:
        """[N, Hkv, size, D] of a cache [pages, page_size, Hkv, D]."""
        if self.strides is not None:
            return cache.as_strided(self.shape, self.strides, cache.storage_offset() + self.offset)
        assert self.pages is not None
        tokens = cache.index_select(0, self.pages).flatten(0, 1)
        if self.dead is not None:
            tokens.index_fill_(0, self.dead, 0.0)
        return tokens.unflatten(0, (self.shape[0], -1))[:, : self.shape[2]].transpose(1, 2)


_Prefixes = tuple[int, int, _Tokens]
"""A range of rows, and the tokens of as many prefixes as they read, each by equally many of them."""


@lru_cache(maxsize=1)
def _plan(layout: PagedLayout, cache: torch.Size) -> tuple[_Tokens, list[_Prefixes]]:
    """Where each row's own tokens lie; and prefixes, without empty ones unless they are read together.

    A decode step's layers share a layout, so lengths and tables are read once a step.
    """
    bounds, lens = layout.cu_prefix_rows.tolist(), layout.prefix_lens.tolist()
    read = [(p, start, end) for p, (start, end) in enumerate(pairwise(bounds)) if end > start]
    suffixes = _tokens(layout.suffix_tables, layout.suffix_lens.tolist(), cache)
    if len(read) > 1 and _is_even(read) and max(lens) * cache[2] * cache[3] <= MOST_COPIED:
        tokens = _tokens(layout.prefix_tables[[p for p, _, _ in read]], [lens[p] for p, _, _ in read], cache)
        return suffixes, [(read[0][1], read[-1][2], tokens)]
    return suffixes, [
        (start, end, _tokens(layout.prefix_tables[p : p + 1], [lens[p]], cache)) for p, start, end in read if lens[p]
    ]


def _is_even(read: list[tuple[int, int, int]]) -> bool:
    """Whether all have equally many rows."""
    return len({end - start for _, start, end in read}) == 1


@lru_cache(maxsize=1)
def _last_tokens(layout: PagedLayout, cache: torch.Size, window: int) -> _Tokens | None:
    """The last `window` tokens of each row, in a cache seen as pages of one token; None if no row has more."""
    pages, page_size, heads, width = cache
    has_prefix = layout.prefix_ids >= 0
    prefix = layout.prefix_ids.clamp(min=0).long()
    if len(layout.prefix_lens) == 0:
        shared = torch.zeros_like(layout.suffix_lens)
    else:
        shared = torch.where(has_prefix, layout.prefix_lens[prefix], 0)
    total = shared + layout.suffix_lens  # [B]
    if int(total.max()) <= window:
        return None
    at = total[:, None] - window + torch.arange(window, device=total.device)  # [B, window], of the whole sequence
    is_own, unused = at >= shared[:, None], at < 0
    inner = torch.where(is_own, at - shared[:, None], at).clamp(min=0)

    def slots_in(tables: Tensor) -> Tensor:
        column = (inner // page_size).clamp(max=tables.shape[1] - 1)
        return tables.long().gather(1, column) * page_size + inner % page_size

    slots = slots_in(layout.suffix_tables)
    if layout.prefix_tables.numel():
        slots = torch.where(is_own, slots, slots_in(layout.prefix_tables[prefix]))
    slots = slots.clamp(0, pages * page_size - 1).flatten()
    size = (len(total), heads, window, width)
    if not bool(unused.any()):
        return _Tokens(size, pages=slots)
    return _Tokens(size, pages=slots, unused=unused, dead=unused.flatten().nonzero().squeeze(1))


def _tokens(tables: Tensor, lens: list[int], cache: torch.Size) -> _Tokens:
    """The tokens of N page tables, so many of each."""
    pages, page_size, heads, width = cache
    count, size = len(lens), max([1, *lens])
    tables = tables[:, : -(-size // page_size)]
    if min(lens) < size:
        size = tables.shape[1] * page_size
        unused = torch.arange(size, device=tables.device) >= torch.tensor(lens, device=tables.device)[:, None]
        dead = unused.flatten().nonzero().squeeze(1)
        used = tables.clamp(0, pages - 1).flatten()
        return _Tokens((count, heads, size, width), pages=used, unused=unused, dead=dead)
    listed = tables.tolist()
    first = listed[0][0]
    stride = listed[1][0] - first if count > 1 else 0
    firsts = (first + row * stride for row in range(count))
    if stride >= 0 and listed == [list(range(start, start + tables.shape[1])) for start in firsts]:
        page = page_size * heads * width
        return _Tokens((count, heads, size, width), (stride * page, width, heads * width, 1), first * page)
    return _Tokens((count, heads, size, width), pages=tables.flatten())


def _attend(
    queries: Tensor,
    tokens: _Tokens,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries [N, Hkv, M, D] to N sequences: outputs like them, log-sum-exp [N, Hkv, M]."""
    keys, values = tokens.read(key_cache), tokens.read(value_cache)
    dtype = computing_dtype(queries)
    bias = tokens.bias(dtype, queries.device)
    if queries.device.type == "cpu" and softcap is None:
        # The CPU operator of scaled_dot_product_attention, with the log-sum-exp: half the time of the code below.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=bias, scale=scale
        )
    scores = (queries @ keys.transpose(-1, -2)).to(dtype) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def _attend_own(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shared: Tensor,
    shared_lse: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of queries [B, H, R, D] to keys of their own [B, H, size, D] and, as one more column of the softmax, to
    a prefix: its result `shared` [B, H, R, D], whose score is the log-sum-exp [B, H, R].

    Each query is put in its KV head's place of a row of zeros [H · D]. So one product of a row reads its keys as they
    lie, all heads of a token side by side: at 128 tokens, H = 2, D = 32 half the time of a product per head or of
    `_scaled_dot_product_flash_attention_for_cpu`, whose strided reads miss the caches (AMD EPYC, 1 thread).
    """
    rows, heads, repeats, width = queries.shape
    keys, values = (x.transpose(1, 2).flatten(2).to(shared_lse.dtype) for x in (keys, values))  # [B, size, H · D]
    wide = queries.unsqueeze(3) * _places(heads, scale, shared_lse.dtype, queries.device)  # [B, H, R, H, D]
    scores = torch.bmm(wide.reshape(rows, heads * repeats, heads * width), keys.transpose(1, 2))
    scores = scores.view(rows, heads, repeats, -1)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    weights = torch.cat((scores, shared_lse.unsqueeze(3)), dim=3).softmax(dim=3)
    own = torch.bmm(weights.view(rows, heads * repeats, -1)[..., :-1], values)
    own = own.view(rows, heads, repeats, heads, width).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return torch.addcmul(own, weights[..., -1:], shared)


@lru_cache(maxsize=8)
def _places(heads: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H, 1, H, 1]: the identity, scaled."""
    return (scale * torch.eye(heads, dtype=dtype, device=device)).view(heads, 1, heads, 1)
