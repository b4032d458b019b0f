"""Decode attention over a paged KV cache, read in place where possible, and writing rotated keys to it."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.types import PagedLayout

_NOTHING = -1e30
"""Score of a token that does not count. Finite, so that attention to nothing is 0 and not NaN."""
_NO_PREFIX = -1e29
"""Log-sum-exp of no prefix: in a row without tokens of its own it outweighs those that do not count."""
MOST_COPIED = 1 << 15
"""Numbers of a prefix's keys. Where none is longer, prefixes are read together: copying one takes less time than
another call of the operator."""
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
    dtype = computing_dtype(query)
    if window is not None and (last := _last_tokens(layout, key_cache.shape, window, dtype)) is not None:
        keys, values = (last[0].read(cache).transpose(1, 2) for cache in (key_cache, value_cache))
        return _attend(queries, keys, values, last[1], scale, softcap)[0].reshape(rows, heads, width)
    plan = _plan(layout, key_cache.shape, heads // kv_heads, dtype)
    found = [_attend_shared(queries, part, key_cache, value_cache, scale, softcap) for part in plan.prefixes.parts]
    if plan.prefixes.has_none:
        found.append((queries.new_zeros(1, width, dtype=dtype), queries.new_full((1,), _NO_PREFIX, dtype=dtype)))
    shared, shared_lse = found[0] if len(found) == 1 else (torch.cat(x) for x in zip(*found, strict=True))
    if plan.rows is not None:
        queries = queries.index_select(0, plan.rows)
    size = queries.shape  # [S · Q, Hkv, R, D]
    keys, values = plan.own.read(key_cache), plan.own.read(value_cache)
    shared, shared_lse = (
        shared.index_select(0, plan.put).view(size),
        shared_lse.index_select(0, plan.put).view(size[:3]),
    )
    if kv_heads <= HEADS_TOGETHER:
        merged = _attend_own(queries, keys, values, shared, shared_lse, plan.bias, scale, softcap)
    else:
        dims = ((queries, 1), (keys, 2), (values, 2), (shared, 1), (shared_lse, 1))
        split = zip(*(x.split(HEADS_TOGETHER, dim=dim) for x, dim in dims), strict=True)
        each = [_attend_own(q, k, v, out, lse, plan.bias, scale, softcap) for q, k, v, out, lse in split]
        merged = torch.cat(each, dim=1)
    if plan.place is not None:
        merged = merged.index_select(0, plan.place)
    return merged.reshape(query.shape).to(query.dtype)


class _Tokens(NamedTuple):
    """Where N sequences' tokens lie in a cache, to be read as [N, size, Hkv, D]."""

    shape: tuple[int, int, int, int]
    """N, size, Hkv, D, where size fits the longest."""
    strides: tuple[int, int, int, int] | None = None
    """A view, read without a copy, if every sequence's pages are consecutive, sequences evenly spaced and as long."""
    offset: int = 0
    slots: Tensor | None = None
    """Otherwise [N · size]; of an unused place, that of some token, since what lies behind a sequence may be NaN."""
    dead: Tensor | None = None
    """Places to be zero, as indices into [N · size]."""

    def read(self, cache: Tensor) -> Tensor:
        """[N, size, Hkv, D] of a cache [pages, page_size, Hkv, D]."""
        if self.strides is not None:
            return cache.as_strided(self.shape, self.strides, cache.storage_offset() + self.offset)
        assert self.slots is not None
        tokens = cache.view(-1, *self.shape[2:]).index_select(0, self.slots)
        if self.dead is not None:
            tokens.index_fill_(0, self.dead, 0.0)
        return tokens.view(self.shape)


class _Part(NamedTuple):
    """N sequences that rows share, up to M rows each."""

    tokens: _Tokens
    bias: Tensor | None
    """[N, 1, 1, size]"""
    take: Tensor
    """[N · Hkv · M]: which of the [B · Hkv] queries read each sequence; those that fill up are any."""


class _Prefixes(NamedTuple):
    """Prefixes that rows read."""

    parts: list[_Part]
    has_none: bool
    """Whether rows without a prefix get zeros, behind what the parts give."""
    put: Tensor
    """[B, Hkv · R]: where in what the parts give each query's is."""


class _Plan(NamedTuple):
    """What a step's layers read. Rows that have the same table of their own are read together: S sequences, up to Q
    rows each."""

    prefixes: _Prefixes
    put: Tensor
    """[S · Q · Hkv · R]: the prefixes', by `rows`."""
    own: _Tokens
    bias: Tensor | None
    """[S, Q, 1, size]"""
    rows: Tensor | None
    """[S · Q]: which row each one is; None: just those, in order."""
    place: Tensor | None
    """[B]: the reverse."""


@lru_cache(maxsize=1)
def _plan(layout: PagedLayout, cache: torch.Size, repeats: int, dtype: torch.dtype) -> _Plan:
    """A decode step's layers share a layout, so lengths and tables are read once a step."""
    count, device = len(layout.suffix_lens), layout.suffix_lens.device
    bounds, lens = layout.cu_prefix_rows.tolist(), layout.prefix_lens.tolist()
    read = [(p, start, end) for p, (start, end) in enumerate(pairwise(bounds)) if end > start and lens[p]]
    pages = [layout.prefix_tables[p, : -(-lens[p] // cache[1])].tolist() for p, _, _ in read]
    ranges = tuple((start, end, lens[p], tuple(table)) for (p, start, end), table in zip(read, pages, strict=True))
    prefixes = _prefixes(ranges, count, cache, repeats, dtype, device)
    own_lens, tables, rows, place = _distinct(layout)
    own = _tokens(tables, [max(some) for some in own_lens], cache)
    put = prefixes.put if rows is None else prefixes.put.index_select(0, rows)
    return _Plan(prefixes, put.flatten(), own, _bias(own_lens, own, dtype, device), rows, place)


@lru_cache(maxsize=8)
def _prefixes(
    ranges: tuple[tuple[int, int, int, tuple[int, ...]], ...],
    count: int,
    cache: torch.Size,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Prefixes:
    """Of prefixes (first row, last + 1, tokens, pages) of `count` rows: many steps have the same."""
    kv_heads, base = cache[2], 0
    first = torch.full((count,), -1)  # of a row's queries in what the parts give
    heads, parts = torch.arange(kv_heads)[:, None], []
    for some in [ranges] if _are_read_together(ranges, cache) else [(one,) for one in ranges]:
        starts, ends, lens, pages = zip(*some, strict=True)
        rows = torch.tensor(starts)[:, None] + torch.arange(max(e - s for s, e, _, _ in some))  # [N, M]
        fills = rows >= torch.tensor(ends)[:, None]
        places = torch.arange(rows.numel()).view(rows.shape) * (repeats * kv_heads) + base
        first[rows[~fills]] = places[~fills]
        base += rows.numel() * repeats * kv_heads
        take = rows.masked_fill(fills, starts[0])[:, None] * kv_heads + heads  # [N, Hkv, M]
        tokens = _tokens(pad_sequence([torch.tensor(p) for p in pages], batch_first=True).to(device), lens, cache)
        parts.append(_Part(tokens, _bias([[n] for n in lens], tokens, dtype, device), take.flatten().to(device)))
    inner = (torch.arange(repeats) * kv_heads + heads).flatten()
    put = torch.where(first[:, None] < 0, base, first[:, None] + inner)
    return _Prefixes(parts, not parts or bool((first < 0).any()), put.to(device))


def _are_read_together(ranges: Sequence[tuple[int, int, int, tuple[int, ...]]], cache: torch.Size) -> bool:
    """Whether to copy prefixes, and to fill up shorter and less read ones, takes less time than a call for each."""
    if len(ranges) < 2:
        return False
    rows, lens = [end - start for start, end, _, _ in ranges], [n for _, _, n, _ in ranges]
    is_full = all(len(sizes) * max(sizes) <= 2 * sum(sizes) for sizes in (rows, lens))
    return is_full and max(lens) * cache[2] * cache[3] <= MOST_COPIED


def _distinct(layout: PagedLayout) -> tuple[list[list[int]], Tensor, Tensor | None, Tensor | None]:
    """By sequence: how many of its tokens each row reads [S][Q], its table [S, …]; then `_Plan.rows` and `place`."""
    lens = layout.suffix_lens
    if layout.is_shared and len(lens):
        sizes = layout.suffix_tables[:, 0].unique_consecutive(return_counts=True)[1]
        most = int(sizes.max())
        if most > 1 and len(sizes) * most <= 2 * len(lens):
            starts, offsets = (sizes.cumsum(0) - sizes)[:, None], torch.arange(most, device=lens.device)
            is_one = offsets < sizes[:, None]
            rows = (starts + offsets).where(is_one, starts)  # [S, Q]
            own = lens[rows]
            longest = rows.gather(1, own.argmax(dim=1, keepdim=True)).squeeze(1)
            return own.tolist(), layout.suffix_tables[longest], rows.flatten(), is_one.flatten().nonzero().squeeze(1)
    return [[n] for n in lens.tolist()], layout.suffix_tables, None, None


def _bias(lens: list[list[int]], tokens: _Tokens, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[N, Q, 1, size]: added to scores of queries that see so many tokens [N][Q]; None if all see all."""
    size = tokens.shape[1]
    if all(n == size for some in lens for n in some):
        return None
    unseen = torch.arange(size, device=device) >= torch.tensor(lens, device=device).unsqueeze(2)
    return torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, _NOTHING).unsqueeze(2)


def _tokens(tables: Tensor, lens: Sequence[int], cache: torch.Size) -> _Tokens:
    """The tokens of N page tables, so many of each."""
    page_size, heads, width = cache[1:]
    count, size = len(lens), max(lens)
    tables, shape = tables[:, : -(-size // page_size)], (count, size, heads, width)
    if size and min(lens) == size:
        listed = tables.tolist()
        first = listed[0][0]
        stride = listed[1][0] - first if count > 1 else 0
        firsts = (first + row * stride for row in range(count))
        if stride >= 0 and listed == [list(range(start, start + tables.shape[1])) for start in firsts]:
            page = page_size * heads * width
            return _Tokens(shape, (stride * page, heads * width, width, 1), first * page)
    slots = tables.long().unsqueeze(2) * page_size + torch.arange(page_size, device=tables.device)
    slots = slots.flatten(1)[:, :size]
    if min(lens) < size:
        is_used = torch.arange(size, device=tables.device) < torch.tensor(lens, device=tables.device)[:, None]
        slots = slots.where(is_used, slots[lens.index(size), :1])
    return _Tokens(shape, slots=slots.flatten())


@lru_cache(maxsize=1)
def _last_tokens(
    layout: PagedLayout, cache: torch.Size, window: int, dtype: torch.dtype
) -> tuple[_Tokens, Tensor | None] | None:
    """The last `window` tokens of each row and their bias [B, 1, 1, window]; None if no row has more."""
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
    size = (len(total), window, heads, width)
    if not bool(unused.any()):
        return _Tokens(size, slots=slots), None
    bias = torch.zeros(unused.shape, dtype=dtype, device=unused.device).masked_fill_(unused, _NOTHING)
    return _Tokens(size, slots=slots, dead=unused.flatten().nonzero().squeeze(1)), bias[:, None, None]


def _attend_shared(
    queries: Tensor, part: _Part, key_cache: Tensor, value_cache: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of `part` among queries [B, Hkv, R, D]: outputs [N · M · R · Hkv, D], log-sum-exp."""
    _, kv_heads, repeats, width = queries.shape
    keys, values = (part.tokens.read(cache).transpose(1, 2) for cache in (key_cache, value_cache))
    some = queries.reshape(-1, repeats * width).index_select(0, part.take).view(len(keys), kv_heads, -1, width)
    found, lse = _attend(some, keys, values, part.bias, scale, softcap)
    # As the CPU operator leaves them in memory.
    return found.transpose(1, 2).reshape(-1, width), lse.transpose(1, 2).reshape(-1)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of queries [N, Hkv, M, D] to keys [N, Hkv, size, D]: outputs like them, log-sum-exp [N, Hkv, M]."""
    if queries.device.type == "cpu" and softcap is None:
        # The CPU operator of scaled_dot_product_attention, with the log-sum-exp: half the time of the code below.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=bias, scale=scale
        )
    scores = (queries @ keys.transpose(-1, -2)).to(computing_dtype(queries)) * scale
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
    """Attention of queries [S · Q, H, R, D] to keys of their own [S, size, H, D] and, as one more column of the
    softmax, to a prefix: its result `shared` [S · Q, H, R, D], whose score is the log-sum-exp [S · Q, H, R].

    Each query is put in its KV head's place of a row of zeros [H · D]. So one product of a sequence reads its keys as
    they lie, all heads of a token side by side: at 128 tokens, H = 2, D = 32 half the time of a product per head or of
    `_scaled_dot_product_flash_attention_for_cpu`, whose strided reads miss the caches (AMD EPYC, 1 thread).
    """
    rows, heads, repeats, width = queries.shape
    count = keys.shape[0]
    keys, values = (x.flatten(2).to(shared_lse.dtype) for x in (keys, values))  # [S, size, H · D]
    wide = queries.unsqueeze(3) * _places(heads, scale, shared_lse.dtype, queries.device)  # [S · Q, H, R, H, D]
    scores = torch.bmm(wide.view(count, -1, heads * width), keys.transpose(1, 2))  # [S, Q · H · R, size]
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.view(*bias.shape[:2], -1, bias.shape[3]).add_(bias)
    weights = torch.cat((scores, shared_lse.reshape(count, -1, 1)), dim=2).softmax(dim=2)
    own = torch.bmm(weights[..., :-1], values)
    own = own.view(rows, heads, repeats, heads, width).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return torch.addcmul(own, weights[..., -1].reshape(rows, heads, repeats, 1), shared)


@lru_cache(maxsize=8)
def _places(heads: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H, 1, H, 1]: the identity, scaled."""
    return (scale * torch.eye(heads, dtype=dtype, device=device)).view(heads, 1, heads, 1)
