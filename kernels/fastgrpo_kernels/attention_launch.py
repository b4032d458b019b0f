"""Launches decode attention: splits, tiles, and the choice of the fastest tiling.

One launch reads the keys of prefixes and rows in splits. Each program writes its weighted values and their log-sum-exp,
and a last kernel merges them. With `grouped`, a prefix is read once for all rows that share it: their query heads form
one tile. Grids and buffers depend on shapes only, so a captured graph is valid for any lengths.

64 rows in groups of 8 on 700 tokens, with 300 of their own, 2 KV heads of 128 in bfloat16: 25 MB, 8.5 us at 3 TB/s. As
separate launches an H100 took: prefixes 10.5 us, rows 11.7 us, merge 2.7 us, rotation 2.7 us.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.autopick import pick
from fastgrpo_kernels.early_launch import early
from fastgrpo_kernels.paged_attention_kernels import attend_kernel, merge_kernel
from fastgrpo_kernels.tl_utils import launch, target_arch
from fastgrpo_kernels.types import PagedLayout

GROUPED_FROM_TOKENS = 256
"""Capacity of a prefix table, in tokens, from which prefixes are read once per group. An estimate, not measured: the
second buffer of partial results costs about as much as reading 200 tokens twice."""

PROGRAMS = 1024
"""Target number of programs: about eight per multiprocessor of a large GPU."""

MAX_SPLITS = 16
LOG2_E = 1.4426950408889634
MEASURED_BYTES = 2**28
"""Page size of the cache on which tilings are timed."""


class Tiling(NamedTuple):
    """How the work is cut."""

    split_tokens: int
    """Minimum tokens of a split."""
    prefix_m: int
    """Query heads in a tile of rows that share a prefix."""
    block_n: int
    """Tokens that a program reads at once."""
    stages: int
    """Blocks of tokens being loaded to shared memory at once."""
    warps: int
    registers: int | None = None
    """A thread's, at most, from sm_90 on; None: as ptxas decides, which here and there spills a few by choice."""
    registers_before: int | None = None
    """The same before sm_90."""


TILINGS = {
    "256 tokens, tile 16": Tiling(256, 16, 32, 2, 4, None, 128),
    "256 tokens, tile 16, one stage": Tiling(256, 16, 32, 1, 4, None, 128),
    "128 tokens, tile 16": Tiling(128, 16, 32, 2, 4, None, 128),
    "256 tokens, tile 32": Tiling(256, 32, 32, 2, 4, 168, 168),
    "128 tokens, tile 32": Tiling(128, 32, 64, 2, 4, None, 216),
    "256 tokens, tile 64": Tiling(256, 64, 64, 3, 8),
}
"""For half precision, the default first; `pick` chooses on a GPU. Wider dtypes read half the tokens at once.

Programs are short and mostly wait for memory, so occupancy matters: registers allow four per multiprocessor with tile
16, one with tile 64. A small tile reads a prefix more often, from L2.
"""


def tilings_for(width: int) -> dict[str, Tiling]:
    """Those for heads of this size: beyond 128 a wider tile spills, or does not fit the shared memory of sm_89, 120."""
    return {name: tiling for name, tiling in TILINGS.items() if width <= 128 or tiling.prefix_m == 16}


class NewTokens(NamedTuple):
    """New tokens that `decode_attention` rotates and writes to the cache."""

    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor


def is_worth_grouping(layout: PagedLayout, key_cache: Tensor) -> bool:
    """Whether prefixes are read once per group."""
    return layout.prefix_tables.shape[1] * key_cache.shape[1] >= GROUPED_FROM_TOKENS


def launch_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    scale: float,
    grouped: bool,
    new: NewTokens | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """[B, Hq, D]; does not check its inputs. `window`, `softcap` 0: none. In windows a row reads its prefix itself."""
    if not len(query):
        return query.new_empty(query.shape)
    grouped = grouped and window == 0  # rows of a prefix would start at different tokens of it
    name = _tiling_for(query, key_cache, layout, grouped, new is not None)
    return _launch(TILINGS[name], query, key_cache, value_cache, layout, scale, grouped, new, window, softcap)


def _launch(
    tiling: Tiling,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    scale: float,
    grouped: bool,
    new: NewTokens | None,
    window: int = 0,
    softcap: float = 0.0,
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
    # Without new tokens these are never read, so any pointer will do.
    key, value, cos, sin, slots = new or (query, query, query, query, layout.suffix_lens)
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))

    half = query.element_size() == 2
    registers = tiling.registers if target_arch() >= 90 else tiling.registers_before
    if tiling.prefix_m == 16 and (new is None or prefixes > 32 or target_arch() >= 120):
        registers = 144 if target_arch() >= 90 else registers  # triton 3.6: ptxas would spill a few to use 96 or 128
    if width > 128:
        registers = 255  # the caps are for heads of 128
    prefix_m = max(tiling.prefix_m, 16, triton.next_power_of_2(group))
    tiles = rows // (prefix_m // group) + prefixes  # at most one tile of each prefix is not full
    split_tokens = tiling.split_tokens
    prefix_splits = _splits(tiles * kv_heads, prefix_room, split_tokens) if grouped else 0
    room = suffix_room if grouped or not has_prefix else max(prefix_room, suffix_room)
    row_splits = _splits(rows * kv_heads, room, split_tokens)
    splits = prefix_splits + row_splits
    partial = torch.empty((rows, heads, splits, width), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=query.device)
    launch(
        attend_kernel,
        ((tiles * prefix_splits + rows * row_splits) * kv_heads,),
        query,
        key,
        value,
        cos.contiguous(),
        sin.contiguous(),
        slots.contiguous(),
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
        *key.stride()[:2],
        *value.stride()[:2],
        layout.suffix_tables.shape[1],
        prefix_pages,
        # exp2 is the hardware's: scores in units of log2.
        scale / softcap if softcap else scale * LOG2_E,
        rows,
        prefixes,
        tiles,
        prefix_splits,
        row_splits,
        window,
        softcap * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=width,
        PAGE_SIZE=page_size,
        GROUPED=grouped,
        READ_PREFIX=has_prefix and not grouped,
        ROTATE=new is not None,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        BLOCK_P=max(8, triton.next_power_of_2(prefixes)),
        PREFIX_M=prefix_m,
        ROW_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tiling.block_n if half else 32,
        BLOCK_H=max(16, triton.next_power_of_2(width // 2)),
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        num_stages=tiling.stages if half else 1,
        num_warps=tiling.warps,
        maxnreg=registers,
        **early(query),
    )
    launch(
        merge_kernel,
        (rows, heads),
        layout.prefix_ids,
        partial,
        partial_lse,
        mixed,
        prefix_splits,
        splits,
        HEADS=heads,
        D=width,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=2,
        **early(query),
    )
    return mixed


def _splits(programs: int, room: int, split_tokens: int) -> int:
    """Number of splits of up to `room` keys."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(room, split_tokens), MAX_SPLITS))


def _tiling_for(query: Tensor, key_cache: Tensor, layout: PagedLayout, grouped: bool, rotate: bool) -> str:
    """The fastest tiling for these shapes, timed with full prefixes and rows' own tokens at half capacity."""
    default = next(iter(TILINGS))
    if len(TILINGS) == 1 or not query.is_cuda or query.element_size() != 2:
        return default
    bucket = triton.next_power_of_2(len(query))  # the number of rows varies if steps are not captured
    shape = (
        bucket,
        *query.shape[1:],
        *key_cache.shape[1:3],
        *layout.prefix_tables.shape,
        layout.suffix_tables.shape[1],
        grouped,
    )
    known = _chosen.get((shape, query.dtype, query.device))
    if known is None:
        inputs = Synthetic(query, key_cache, layout, rotate)
        candidates = {name: inputs.call(tiling, grouped) for name, tiling in tilings_for(query.shape[2]).items()}
        known = pick("paged_attention", shape, query, candidates, default=default, agrees=inputs.agrees)
        if not torch.cuda.is_current_stream_capturing():
            _chosen[shape, query.dtype, query.device] = known
    return known


_chosen: dict[tuple[tuple[int, ...], torch.dtype, torch.device], str] = {}


class Synthetic:
    """Random inputs of given shapes, created at first use."""

    def __init__(self, query: Tensor, key_cache: Tensor, layout: PagedLayout, rotate: bool) -> None:
        self.like = query, key_cache, layout
        self.rotate = rotate
        self.inputs: tuple[Tensor, Tensor, PagedLayout, NewTokens | None] | None = None

    def call(self, tiling: Tiling, grouped: bool) -> Callable[[], Tensor]:
        """Attention with this tiling. Writes no new tokens: `slots` are −1 and the angles 0."""

        def run() -> Tensor:
            query, cache, layout, new = self.make()
            return _launch(tiling, query, cache, cache, layout, query.shape[2] ** -0.5, grouped, new)

        return run

    def make(self) -> tuple[Tensor, Tensor, PagedLayout, NewTokens | None]:
        if self.inputs is None:
            query, cache, layout = self.like
            rows, width, device = len(query), query.shape[2], query.device
            (prefixes, prefix_pages), suffix_pages = layout.prefix_tables.shape, layout.suffix_tables.shape[1]
            used = prefixes * prefix_pages + rows * suffix_pages
            pages = max(1, min(used, MEASURED_BYTES // cache[0].nbytes))
            tables = (torch.arange(used, dtype=torch.int32, device=device) % pages).split(
                [prefixes * prefix_pages, rows * suffix_pages]
            )
            ids = torch.arange(rows, dtype=torch.int32, device=device) * prefixes // rows
            made = PagedLayout(
                suffix_tables=tables[1].view(rows, suffix_pages),
                suffix_lens=torch.full_like(layout.suffix_lens, suffix_pages * cache.shape[1] // 2),
                prefix_tables=tables[0].view(prefixes, prefix_pages),
                prefix_lens=torch.full_like(layout.prefix_lens, prefix_pages * cache.shape[1]),
                prefix_ids=ids if prefixes else torch.full_like(ids, -1),
                cu_prefix_rows=torch.searchsorted(
                    ids, torch.arange(prefixes + 1, dtype=torch.int32, device=device), out_int32=True
                ),
            )
            new = None
            if self.rotate:
                one = torch.ones((rows, width), dtype=torch.float32, device=device)
                some = torch.zeros((rows, cache.shape[2], width), dtype=query.dtype, device=device)
                slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
                new = NewTokens(some, some, one, torch.zeros_like(one), slots)
            own = torch.Generator(device).manual_seed(0)  # not the user's stream of random numbers
            made_query = torch.empty(query.shape, dtype=query.dtype, device=device).normal_(generator=own)
            made_cache = cache.new_empty(pages, *cache.shape[1:]).normal_(generator=own)
            self.inputs = made_query, made_cache, made, new
        return self.inputs

    def agrees(self, result: Tensor) -> bool:
        query, cache, layout, _ = self.make()
        exact = reference.paged_attention(query, cache, cache, layout, scale=query.shape[2] ** -0.5)
        return bool((result - exact).abs().max() <= 0.02 * exact.abs().max())


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: the 2B and 7B models, and Gemma 2 of 2B (heads of 256, capped scores), on
    groups of 8 with a prefix of 704 tokens."""

    def case(
        rows: int,
        heads: int,
        kv_heads: int,
        page_size: int,
        grouped: bool,
        tiling: Tiling,
        *,
        width: int = 128,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Callable[[], None]:
        def run() -> None:
            def integers(*shape: int) -> Tensor:
                return torch.empty(shape, dtype=torch.int32, device="meta")

            packed = torch.empty(rows, heads + 2 * kv_heads, width, dtype=torch.bfloat16, device="meta")
            query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
            angle = torch.empty(rows, width, dtype=torch.float32, device="meta")
            suffixes, prefixes = integers(rows, 384 // page_size), integers(rows // 8, 704 // page_size)
            shape = (suffixes.numel() + prefixes.numel(), page_size, kv_heads, width)  # each page read once
            keys, values = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(2))
            prefix_lens, cu_rows = integers(rows // 8), integers(rows // 8 + 1)
            layout = PagedLayout(suffixes, integers(rows), prefixes, prefix_lens, integers(rows), cu_rows)
            slots = torch.empty(rows, dtype=torch.int64, device="meta")
            for new in (NewTokens(key, value, angle, angle, slots), None):
                _launch(tiling, query, keys, values, layout, width**-0.5, grouped, new, window, softcap)

        return run

    for name, tiling in TILINGS.items():
        for heads, kv_heads in ((12, 2), (28, 4)):
            label = f"attention {heads}/{kv_heads} page 16 B=64 grouped=True {name}"
            yield label, case(64, heads, kv_heads, 16, True, tiling)
    default = next(iter(TILINGS.values()))
    for rows, page_size, grouped in ((8, 16, True), (512, 16, True), (64, 64, True), (64, 16, False)):
        label = f"attention 12/2 page {page_size} B={rows} grouped={grouped}"
        yield label, case(rows, 12, 2, page_size, grouped, default)
    yield "attention 12/2 page 16 B=64 window 512", case(64, 12, 2, 16, False, default, window=512)
    for name, tiling in tilings_for(256).items():
        label = f"attention 8/4 of 256 page 16 B=64 capped {name}"
        yield label, case(64, 8, 4, 16, True, tiling, width=256, softcap=50.0)
    label = "attention 8/4 of 256 page 16 B=64 capped window 512"
    yield label, case(64, 8, 4, 16, False, default, width=256, window=512, softcap=50.0)
