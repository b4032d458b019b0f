"""Decode attention over a paged KV cache in which rows may share the pages of their prefix.

Keys are read in splits, by as many programs as fill a GPU; each leaves its weighted values and their log-sum-exp, and a
last kernel merges them. Grouped, the prefix is read once for all rows that share it: their query heads stand in one
tile. Grids and buffers follow from shapes alone, so a captured graph holds for any lengths.
"""

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import check_caches, shape_of
from fastgrpo_kernels.paged_attention_kernels import merge_kernel, prefix_kernel, row_kernel
from fastgrpo_kernels.tl_utils import launch
from fastgrpo_kernels.types import PagedLayout

GROUPED_FROM_TOKENS = 256
"""Room in a prefix table, in tokens, from which prefixes are read once per group. An estimate (the second buffer of
partial results costs about what reading 200 tokens twice does), not measured."""

PROGRAMS = 512
"""How many programs the splits of a kernel aim at: about four for each multiprocessor of a large GPU."""

SPLIT_TOKENS = 256
"""Fewest tokens that a split is made for."""

MAX_SPLITS = 16


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    grouped: bool | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale · q·K) V of one query per row, over the row's prefix and then its own tokens. [B, Hq, D].

    A row without any tokens gives 0. Query head h reads KV head h // (Hq / Hkv). No gradients.

    Args:
        query: [B, Hq, D].
        key_cache: [pages, page_size, Hkv, D], contiguous.
        value_cache: the same.
        layout: which pages each row reads, on the same device.
        grouped: whether a prefix is read once for all rows that share it. Both give the same result up to rounding.
            None: on the torch backend yes, on triton where prefix tables have room for GROUPED_FROM_TOKENS.

    Raises:
        ValueError: shapes that do not fit, or caches that are not contiguous.
    """
    check_caches(key_cache, value_cache)
    kv_heads, width = key_cache.shape[2:]
    if query.ndim != 3 or query.shape[2] != width or query.shape[1] % kv_heads:
        raise ValueError(
            f"query {shape_of(query)} does not fit caches {shape_of(key_cache)}: pass [B, Hq, D], Hq a multiple of Hkv."
        )
    rows, prefixes = len(query), len(layout.prefix_lens)
    if layout.suffix_tables.shape[:1] != (rows,) or layout.suffix_lens.shape != (rows,):
        raise ValueError(
            f"suffix_tables {shape_of(layout.suffix_tables)}, suffix_lens {shape_of(layout.suffix_lens)} do not fit "
            f"query {shape_of(query)}: pass [B, S] and [B]."
        )
    if layout.prefix_ids.shape != (rows,) or layout.cu_prefix_rows.shape != (prefixes + 1,):
        raise ValueError(
            f"prefix_ids {shape_of(layout.prefix_ids)}, cu_prefix_rows {shape_of(layout.cu_prefix_rows)} do not fit "
            f"{rows} rows and prefix_lens {shape_of(layout.prefix_lens)}: pass [B] and [P + 1]."
        )
    name = pick_backend(query, backend)
    if grouped is None:
        prefix_room = layout.prefix_tables.shape[1] * key_cache.shape[1]
        grouped = name == "torch" or prefix_room >= GROUPED_FROM_TOKENS
    if name == "torch":
        return cpu.paged_attention(query, key_cache, value_cache, layout, scale=scale, grouped=grouped)
    return _operator(
        query,
        key_cache,
        value_cache,
        layout.suffix_tables,
        layout.suffix_lens,
        layout.prefix_tables,
        layout.prefix_lens,
        layout.prefix_ids,
        layout.cu_prefix_rows,
        scale,
        grouped,
    )


def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    suffix_tables: Tensor,
    suffix_lens: Tensor,
    prefix_tables: Tensor,
    prefix_lens: Tensor,
    prefix_ids: Tensor,
    cu_prefix_rows: Tensor,
    scale: float,
    grouped: bool,
) -> Tensor:
    layout = PagedLayout(suffix_tables, suffix_lens, prefix_tables, prefix_lens, prefix_ids, cu_prefix_rows)
    return _launch(query, key_cache, value_cache, layout, scale, grouped)


def _fake(query: Tensor, *_: Tensor | float | bool) -> Tensor:
    return query.new_empty(query.shape)


_operator = register_operator(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor suffix_tables, Tensor suffix_lens, "
    "Tensor prefix_tables, Tensor prefix_lens, Tensor prefix_ids, Tensor cu_prefix_rows, float scale, bool grouped) "
    "-> Tensor",
    _paged_attention,
    _fake,
)


def _launch(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, scale: float, grouped: bool
) -> Tensor:
    rows, heads, width = query.shape
    page_size, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    prefixes, prefix_pages = layout.prefix_tables.shape
    prefix_room, suffix_room = prefix_pages * page_size, layout.suffix_tables.shape[1] * page_size
    has_prefix = prefixes > 0 and prefix_pages > 0
    grouped = grouped and has_prefix
    query = query if query.stride(2) == 1 else query.contiguous()
    mixed = torch.empty((rows, heads, width), dtype=query.dtype, device=query.device)
    if rows == 0:
        return mixed

    block_rows = min(64, max(16, triton.next_power_of_2(rows * group)))  # query heads of a tile
    tiles = rows // (block_rows // group) + prefixes  # at most one tile of each prefix is not full
    prefix_splits = _splits(tiles * kv_heads, prefix_room) if grouped else 0
    row_splits = _splits(rows * kv_heads, suffix_room if grouped or not has_prefix else prefix_room + suffix_room)
    splits = prefix_splits + row_splits
    partial = torch.empty((rows, heads, splits, width), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=query.device)

    shared: tuple[Tensor | int | float, ...] = (
        query,
        key_cache,
        value_cache,
        layout.suffix_tables.contiguous(),
        layout.suffix_lens,
        layout.prefix_tables.contiguous(),
        layout.prefix_lens,
        layout.prefix_ids,
        layout.cu_prefix_rows,
        partial,
        partial_lse,
        *query.stride()[:2],
        layout.suffix_tables.shape[1],
        prefix_pages,
        scale * 1.4426950408889634,  # exp2 is the hardware's: scores in units of log2
    )
    meta = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "D": width,
        "PAGE_SIZE": page_size,
        "SPLITS": splits,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_N": 64 if query.element_size() == 2 else 32,
        "num_stages": 3 if query.element_size() == 2 else 2,
    }
    if grouped:
        launch(
            prefix_kernel,
            (tiles, kv_heads, prefix_splits),
            *shared,
            PREFIXES=prefixes,
            PREFIX_SPLITS=prefix_splits,
            BLOCK_P=triton.next_power_of_2(prefixes),
            BLOCK_M=block_rows,
            num_warps=8 if block_rows == 64 else 4,  # a tile of 64 heads takes 255 registers of 4 warps
            **meta,
        )
    launch(
        row_kernel,
        (rows, kv_heads, row_splits),
        *shared,
        READ_PREFIX=has_prefix and not grouped,
        PREFIX_SPLITS=prefix_splits,
        ROW_SPLITS=row_splits,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        num_warps=4,
        **meta,
    )
    launch(
        merge_kernel,
        (rows, heads),
        layout.prefix_ids,
        partial,
        partial_lse,
        mixed,
        PREFIX_SPLITS=prefix_splits,
        SPLITS=splits,
        HEADS=heads,
        D=width,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=2,
    )
    return mixed


def _splits(programs: int, room: int) -> int:
    """Into how many splits each program's keys are cut, of at most `room` tokens."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(room, SPLIT_TOKENS), MAX_SPLITS))


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: the 2B and 7B models, groups of 8 on a prefix of 704 tokens."""

    def case(rows: int, heads: int, kv_heads: int, page_size: int, grouped: bool) -> Callable[[], None]:
        def run() -> None:
            def integers(*shape: int) -> Tensor:
                return torch.empty(shape, dtype=torch.int32, device="meta")

            query = torch.empty(rows, heads, 128, dtype=torch.bfloat16, device="meta")
            cache = torch.empty(64, page_size, kv_heads, 128, dtype=torch.bfloat16, device="meta")
            suffixes, prefixes = integers(rows, 384 // page_size), integers(rows // 8, 704 // page_size)
            prefix_lens, cu_rows = integers(rows // 8), integers(rows // 8 + 1)
            layout = PagedLayout(suffixes, integers(rows), prefixes, prefix_lens, integers(rows), cu_rows)
            _launch(query, cache, cache, layout, 128**-0.5, grouped)

        return run

    for heads, kv_heads in ((12, 2), (28, 4)):
        for page_size in (16, 32, 64):
            for rows in (8, 64, 256, 512):
                for grouped in (True, False):
                    label = f"paged_attention {heads}/{kv_heads} page {page_size} B={rows} grouped={grouped}"
                    yield label, case(rows, heads, kv_heads, page_size, grouped)
