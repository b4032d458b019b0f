"""The kernels of decode attention: splits of shared prefixes and of single rows in one launch, and their merge."""

import triton
import triton.language as tl

from fastgrpo_kernels.early_launch import wait_for_inputs


@triton.jit(do_not_specialize=["rows", "prefixes", "tiles", "prefix_splits", "row_splits", "window"])
def attend_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
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
    key_stride_row: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_row: tl.tensor,
    value_stride_head: tl.tensor,
    suffix_pages: tl.tensor,
    prefix_pages: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    prefixes: tl.tensor,
    tiles: tl.tensor,
    prefix_splits: tl.tensor,
    row_splits: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    READ_PREFIX: tl.constexpr,
    ROTATE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PREFIX_M: tl.constexpr,
    ROW_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One split of the keys of a prefix, for a tile of rows that share it (GROUPED), or of one row's own keys.

    Both for the query heads of one KV head; prefixes have the first programs. READ_PREFIX: a row reads its prefix
    itself. ROTATE: queries and keys still have to be rotated, and each row's new key and value are not in the cache
    yet: its first split writes and includes them. WINDOWED: a row reads its last `window` tokens only.
    CAPPED: scores s, in units of log2, become cap · tanh(s); `scale` then gives s / cap.
    """
    wait_for_inputs(EARLY)
    TILE_ROWS: tl.constexpr = PREFIX_M // GROUP
    splits = prefix_splits + row_splits
    program = tl.program_id(0)
    prefix_programs = tiles * prefix_splits * KV_HEADS
    if program < prefix_programs:
        if GROUPED:
            kv_head = program % KV_HEADS
            tile = program // KV_HEADS % tiles
            split = program // KV_HEADS // tiles
            p = tl.arange(0, BLOCK_P)
            first_row = tl.load(cu_prefix_rows + p, mask=p < prefixes, other=0)
            last_row = tl.load(cu_prefix_rows + p + 1, mask=p < prefixes, other=0)
            prefix_tiles = (last_row - first_row + TILE_ROWS - 1) // TILE_ROWS  # [P]
            end_tile = tl.cumsum(prefix_tiles, 0)
            prefix = tl.sum((end_tile <= tile).to(tl.int32), 0)  # the one whose tiles hold this tile
            if prefix < prefixes:
                mine = p == prefix
                tile_in_prefix = tile - tl.sum(tl.where(mine, end_tile - prefix_tiles, 0), 0)
                m = tl.arange(0, PREFIX_M)
                row = tl.sum(tl.where(mine, first_row, 0), 0) + tile_in_prefix * TILE_ROWS + m // GROUP
                live = (m < TILE_ROWS * GROUP) & (row < tl.sum(tl.where(mine, last_row, 0), 0))
                head = kv_head * GROUP + m % GROUP
                row = row.to(tl.int64)
                at = row * query_stride_row + head * query_stride_head
                q_low, q_high = _load_heads(query, at, row, live, cos, sin, ROTATE, D, BLOCK_H)
                begin, end = _split_range(0, tl.load(prefix_lens + prefix), split, prefix_splits, BLOCK_N)
                top, total, mixed = _nothing_yet(PREFIX_M, BLOCK_D)
                table = prefix_tables + prefix.to(tl.int64) * prefix_pages
                top, total, mixed = _attend(
                    q_low, q_high, top, total, mixed, begin, end, table, key_cache, value_cache, kv_head, scale, cap,
                    KV_HEADS, D, PAGE_SIZE, CAPPED, BLOCK_N, BLOCK_H, BLOCK_D,
                )  # fmt: skip
                slot = (row * (KV_HEADS * GROUP) + head) * splits + split
                _store_partial(partial, partial_lse, slot, live, top, total, mixed, D, BLOCK_D)
    else:
        program -= prefix_programs
        kv_head = program % KV_HEADS
        one_row = (program // KV_HEADS % rows).to(tl.int64)
        split = program // KV_HEADS // rows
        m = tl.arange(0, ROW_M)
        live = m < GROUP
        head = kv_head * GROUP + m
        row = one_row + m * 0
        at = row * query_stride_row + head * query_stride_head
        q_low, q_high = _load_heads(query, at, row, live, cos, sin, ROTATE, D, BLOCK_H)
        if ROTATE:  # asked for before the loop over what is cached: a row has no time to wait for one after the other
            new_slot = tl.load(slots + one_row)
            is_mine = (split == 0) & (new_slot >= 0)
            new_low, new_high, new_value = _write_new(
                is_mine, one_row, key + one_row * key_stride_row + kv_head * key_stride_head,
                value + one_row * value_stride_row + kv_head * value_stride_head, cos, sin,
                key_cache + (new_slot * KV_HEADS + kv_head) * D, value_cache + (new_slot * KV_HEADS + kv_head) * D,
                D, BLOCK_H, BLOCK_D,
            )  # fmt: skip
        top, total, mixed = _nothing_yet(ROW_M, BLOCK_D)
        first = 0  # of the row's own tokens that are seen
        if READ_PREFIX:
            prefix = tl.load(prefix_ids + one_row)
            length = tl.load(prefix_lens + prefix, mask=prefix >= 0, other=0)
            if WINDOWED:
                unseen = tl.maximum(length + tl.load(suffix_lens + one_row) - window, 0)
                first = tl.maximum(unseen - length, 0)
                begin, end = _split_range(tl.minimum(unseen, length), length, split, row_splits, BLOCK_N)
            else:
                begin, end = _split_range(0, length, split, row_splits, BLOCK_N)
            table = prefix_tables + prefix.to(tl.int64) * prefix_pages
            top, total, mixed = _attend(
                q_low, q_high, top, total, mixed, begin, end, table, key_cache, value_cache, kv_head, scale, cap,
                KV_HEADS, D, PAGE_SIZE, CAPPED, BLOCK_N, BLOCK_H, BLOCK_D,
            )  # fmt: skip
        length = tl.load(suffix_lens + one_row)
        if WINDOWED and not READ_PREFIX:
            first = tl.maximum(length - window, 0)
        if ROTATE:
            length -= (new_slot >= 0).to(tl.int32)
        begin, end = _split_range(first, length, split, row_splits, BLOCK_N)
        table = suffix_tables + one_row * suffix_pages
        top, total, mixed = _attend(
            q_low, q_high, top, total, mixed, begin, end, table, key_cache, value_cache, kv_head, scale, cap,
            KV_HEADS, D, PAGE_SIZE, CAPPED, BLOCK_N, BLOCK_H, BLOCK_D,
        )  # fmt: skip
        if ROTATE:
            top, total, mixed = _attend_new(
                q_low, q_high, top, total, mixed, is_mine, new_low, new_high, new_value, scale, cap, CAPPED
            )
        slot = (row * (KV_HEADS * GROUP) + head) * splits + prefix_splits + split
        _store_partial(partial, partial_lse, slot, live, top, total, mixed, D, BLOCK_D)


@triton.jit
def _load_heads(
    source: tl.tensor,
    at: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    ROTATE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves [M, D / 2] of heads that start at `at` [M], rotated by their rows' angles if ROTATE, rounded once.

    In halves, since the rotation combines them: loading whole heads twice would take more registers and lower the
    occupancy.
    """
    h = tl.arange(0, BLOCK_H)
    mask = live[:, None] & (h[None, :] < D // 2)
    place = source + at[:, None] + h[None, :]
    low = tl.load(place, mask=mask, other=0.0)
    high = tl.load(place + D // 2, mask=mask, other=0.0)
    if ROTATE:
        angle = row[:, None] * D + h[None, :]
        first, second = low.to(tl.float32), high.to(tl.float32)
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        low = (first * c - second * s).to(low.dtype)
        c = tl.load(cos + angle + D // 2, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle + D // 2, mask=mask, other=0.0).to(tl.float32)
        high = (second * c + first * s).to(high.dtype)
    return low, high


@triton.jit
def _split_range(
    first: tl.tensor, length: tl.tensor, split: tl.tensor, splits: tl.tensor, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens begin … end of a split of tokens first … length: equal parts, in whole blocks."""
    size = tl.cdiv(tl.cdiv(length - first, splits), BLOCK_N) * BLOCK_N
    begin = first + split * size
    return begin, tl.minimum(begin + size, length)


@triton.jit
def _nothing_yet(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Initial state of the online softmax: greatest score, sum of weights, weighted values."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return top, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def _attend(
    q_low: tl.tensor,
    q_high: tl.tensor,
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
    cap: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over tokens begin … end of a page table, continued from (top, total, mixed)."""
    d = tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < end
        page = tl.load(table + n // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        at = ((page * PAGE_SIZE + n % PAGE_SIZE) * KV_HEADS + kv_head) * D  # [N]
        in_half = live[:, None] & (h[None, :] < D // 2)
        keys = key_cache + at[:, None] + h[None, :]
        k_low = tl.load(keys, mask=in_half, other=0.0)  # [N, D / 2]
        k_high = tl.load(keys + D // 2, mask=in_half, other=0.0)
        values = value_cache + at[:, None] + d[None, :]
        v = tl.load(values, mask=live[:, None] & (d[None, :] < D), other=0.0)  # [N, D]
        scores = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
        scores = tl.where(live[None, :], scores, float("-inf"))  # [M, N]
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: the first token of a block is live
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        top = new_top
    return top, total, mixed


@triton.jit
def _write_new(
    is_mine: tl.tensor,
    row: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    key_target: tl.tensor,
    value_target: tl.tensor,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A row's new key, rotated, in halves [1, D / 2], and its value [1, D]; written to the cache where `is_mine`."""
    h = tl.arange(0, BLOCK_H)[None, :]
    d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.zeros([1], tl.int64)
    low, high = _load_heads(key, one, one + row, one == 0, cos, sin, True, D, BLOCK_H)
    new_value = tl.load(value + d, mask=d < D, other=0.0)
    half = tl.where(is_mine, D // 2, 0)
    tl.store(key_target + h, low, mask=h < half)
    tl.store(key_target + D // 2 + h, high, mask=h < half)
    tl.store(value_target + d, new_value, mask=d < tl.where(is_mine, D, 0))
    return low, high, new_value


@triton.jit
def _attend_new(
    q_low: tl.tensor,
    q_high: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    is_mine: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    new_value: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds the row's new token to the online softmax where `is_mine`."""
    score = tl.sum(q_low.to(tl.float32) * low.to(tl.float32), 1)
    score = (score + tl.sum(q_high.to(tl.float32) * high.to(tl.float32), 1)) * scale  # [M]
    if CAPPED:
        score = cap * (2.0 * tl.sigmoid(2.0 * score) - 1.0)
    score = tl.where(is_mine, score, float("-inf"))
    new_top = tl.maximum(top, score)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    fade = tl.exp2(top - shift)
    weight = tl.exp2(score - shift)
    total = total * fade + weight
    return new_top, total, mixed * fade[:, None] + weight[:, None] * new_value.to(tl.float32)


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
    """Stores a split's result: 0 and −inf for a split without tokens."""
    d = tl.arange(0, BLOCK_D)
    some = total > 0
    total = tl.where(some, total, 1.0)
    target = partial + slot[:, None] * D + d[None, :]
    tl.store(target, mixed / total[:, None], mask=live[:, None] & (d[None, :] < D))
    tl.store(partial_lse + slot, tl.where(some, top + tl.log2(total), float("-inf")), mask=live)


@triton.jit(do_not_specialize=["prefix_splits", "splits"])
def merge_kernel(
    prefix_ids: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    mixed: tl.tensor,
    prefix_splits: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One row and head: its splits' values, weighted by the exp of their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    at = row * HEADS + tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    wait_for_inputs(EARLY)
    # No tile holds a row without a prefix.
    first = tl.where(tl.load(prefix_ids + row) >= 0, 0, prefix_splits)
    written = (s >= first) & (s < splits)
    lse = tl.load(partial_lse + at * splits + s, mask=written, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total > 0, total, 1.0)
    source = partial + (at * splits + s[:, None]) * D + d[None, :]
    values = tl.load(source, mask=written[:, None] & (d[None, :] < D), other=0.0)  # [S, D]
    tl.store(mixed + at * D + d, tl.sum(values * weights[:, None], 0), mask=d < D)
