"""The kernels of `paged_attention`: splits of shared prefixes, splits of single rows, and their merge."""

import triton
import triton.language as tl


@triton.jit
def prefix_kernel(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    suffix_tables: tl.tensor,
    suffix_lens: tl.tensor,
    prefix_tables: tl.tensor,
    prefix_lens: tl.tensor,
    prefix_ids: tl.tensor,
    cu_prefix_rows: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    query_stride_row: tl.tensor,
    query_stride_head: tl.tensor,
    suffix_pages: tl.tensor,
    prefix_pages: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFIXES: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One split of one prefix, for a tile of rows that share it: all their query heads of one KV head."""
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p = tl.arange(0, BLOCK_P)
    first_row = tl.load(cu_prefix_rows + p, mask=p < PREFIXES, other=0)
    last_row = tl.load(cu_prefix_rows + p + 1, mask=p < PREFIXES, other=0)
    tiles = (last_row - first_row + TILE_ROWS - 1) // TILE_ROWS  # [P]
    end_tile = tl.cumsum(tiles, 0)
    prefix = tl.sum((end_tile <= tile).to(tl.int32), 0)  # the one whose tiles hold this tile
    if prefix < PREFIXES:
        mine = p == prefix
        tile_in_prefix = tile - tl.sum(tl.where(mine, end_tile - tiles, 0), 0)
        m = tl.arange(0, BLOCK_M)
        row = tl.sum(tl.where(mine, first_row, 0), 0) + tile_in_prefix * TILE_ROWS + m // GROUP
        live = (m < TILE_ROWS * GROUP) & (row < tl.sum(tl.where(mine, last_row, 0), 0))
        head = kv_head * GROUP + m % GROUP
        d = tl.arange(0, BLOCK_D)
        row = row.to(tl.int64)
        source = query + row[:, None] * query_stride_row + head[:, None] * query_stride_head + d[None, :]
        q = tl.load(source, mask=live[:, None] & (d[None, :] < D), other=0.0)  # [M, D]
        begin, end = _split_range(tl.load(prefix_lens + prefix), split, PREFIX_SPLITS, BLOCK_N)
        top, total, mixed = _nothing_yet(BLOCK_M, BLOCK_D)
        table = prefix_tables + prefix.to(tl.int64) * prefix_pages
        top, total, mixed = _attend(
            q, top, total, mixed, begin, end, table, key_cache, value_cache, kv_head, scale,
            KV_HEADS, D, PAGE_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        slot = (row * (KV_HEADS * GROUP) + head) * SPLITS + split
        _store_partial(partial, partial_lse, slot, live, top, total, mixed, D, BLOCK_D)


@triton.jit
def row_kernel(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    suffix_tables: tl.tensor,
    suffix_lens: tl.tensor,
    prefix_tables: tl.tensor,
    prefix_lens: tl.tensor,
    prefix_ids: tl.tensor,
    cu_prefix_rows: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    query_stride_row: tl.tensor,
    query_stride_head: tl.tensor,
    suffix_pages: tl.tensor,
    prefix_pages: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    READ_PREFIX: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    ROW_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One split of a row's own tokens, and of its prefix where READ_PREFIX, for the query heads of one KV head."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    live = m < GROUP
    head = kv_head * GROUP + m
    d = tl.arange(0, BLOCK_D)
    source = query + row * query_stride_row + head[:, None] * query_stride_head + d[None, :]
    q = tl.load(source, mask=live[:, None] & (d[None, :] < D), other=0.0)  # [M, D]
    top, total, mixed = _nothing_yet(BLOCK_M, BLOCK_D)
    if READ_PREFIX:
        prefix = tl.load(prefix_ids + row)
        length = tl.load(prefix_lens + prefix, mask=prefix >= 0, other=0)
        begin, end = _split_range(length, split, ROW_SPLITS, BLOCK_N)
        table = prefix_tables + prefix.to(tl.int64) * prefix_pages
        top, total, mixed = _attend(
            q, top, total, mixed, begin, end, table, key_cache, value_cache, kv_head, scale,
            KV_HEADS, D, PAGE_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    begin, end = _split_range(tl.load(suffix_lens + row), split, ROW_SPLITS, BLOCK_N)
    table = suffix_tables + row * suffix_pages
    top, total, mixed = _attend(
        q, top, total, mixed, begin, end, table, key_cache, value_cache, kv_head, scale,
        KV_HEADS, D, PAGE_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    slot = (row * (KV_HEADS * GROUP) + head) * SPLITS + PREFIX_SPLITS + split
    _store_partial(partial, partial_lse, slot, live, top, total, mixed, D, BLOCK_D)


@triton.jit
def _split_range(
    length: tl.tensor, split: tl.tensor, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens begin … end of a split: equal parts, in whole blocks."""
    size = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * size
    return begin, tl.minimum(begin + size, length)


@triton.jit
def _nothing_yet(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Greatest score, sum of weights and weighted values, over no tokens."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return top, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def _attend(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    table: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    kv_head: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over tokens begin … end of a page table, continued from (top, total, mixed)."""
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < end
        page = tl.load(table + n // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        at = ((page * PAGE_SIZE + n % PAGE_SIZE) * KV_HEADS + kv_head) * D  # [N]
        mask = live[:, None] & (d[None, :] < D)
        k = tl.load(key_cache + at[:, None] + d[None, :], mask=mask, other=0.0)  # [N, D]
        v = tl.load(value_cache + at[:, None] + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(live[None, :], scores, float("-inf"))  # [M, N]
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: the first token of a block is live
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        top = new_top
    return top, total, mixed


@triton.jit
def _store_partial(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    slot: tl.tensor,
    live: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A split without tokens leaves 0 and −inf."""
    d = tl.arange(0, BLOCK_D)
    some = total > 0
    total = tl.where(some, total, 1.0)
    target = partial + slot[:, None] * D + d[None, :]
    tl.store(target, mixed / total[:, None], mask=live[:, None] & (d[None, :] < D))
    tl.store(partial_lse + slot, tl.where(some, top + tl.log2(total), float("-inf")), mask=live)


@triton.jit
def merge_kernel(
    prefix_ids: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    mixed: tl.tensor,
    PREFIX_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One row and head: its splits' values, weighted by the exp of their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    at = row * HEADS + tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    written = s < SPLITS
    if PREFIX_SPLITS > 0:  # no tile holds a row without a prefix
        first = tl.where(tl.load(prefix_ids + row) >= 0, 0, PREFIX_SPLITS)
        written = written & (s >= first)
    lse = tl.load(partial_lse + at * SPLITS + s, mask=written, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total > 0, total, 1.0)
    source = partial + (at * SPLITS + s[:, None]) * D + d[None, :]
    values = tl.load(source, mask=written[:, None] & (d[None, :] < D), other=0.0)  # [S, D]
    tl.store(mixed + at * D + d, tl.sum(values * weights[:, None], 0), mask=d < D)
