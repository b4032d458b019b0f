"""The products behind `linear_logprob`: logits with their statistics by Triton, both gradients by cuBLAS.

Each is 2·T·H·V floating-point operations. 16,384 tokens, H = 1536 and V = 151,936 make 7.65 TFLOP a product, 22.9 for
forward and backward together: 29.6 ms at the 776 TFLOP/s that an H100 reaches in large bfloat16 products.

Logits exist in tiles of [rows, columns] only. The forward product reduces each tile in its float32 accumulator to a
maximum, a sum and, for the entropy, a weighted sum. What it may keep for the backward pass is
e = exp(z − tile maximum) in hidden's dtype: its relative error is 2^-9 in bfloat16 whatever the logits' size, where
a logit of 32 itself would be off by 0.06. Then p = e · exp(tile maximum − lse).

The maximum is subtracted before scaling by log2(e) / temperature: exact near the maximum, where it matters, and three
instructions per entry.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgrpo_kernels.tl_utils import launch, multiprocessors, target_arch

_ROW_BLOCK_GROUP = 16
"""Row blocks that share a column block run together, so their operands stay in L2 while columns stream past."""


_LOG2_E = tl.constexpr(math.log2(math.e))


class Tile(NamedTuple):
    """Rows and columns of logits per program and tile; step along the reduced dimension; warps."""

    rows: int
    columns: int
    step: int
    num_warps: int


def logits_tile(dtype: torch.dtype) -> Tile:
    """The largest that compiles without spills: 128×256×64, on sm_90 only."""
    if dtype.itemsize > 2:
        return Tile(64, 128, 32, 8)
    return Tile(128, 256, 64, 8) if target_arch() == 90 else Tile(128, 128, 32, 8)


class Way(NamedTuple):
    """How `launch_logits` computes."""

    tma: bool = False
    """Whether to load operands and store exponentials by the tensor memory accelerator (sm_90 and later), in a
    persistent grid; else one program per tile loads by pointers."""
    num_stages: int = 3
    flatten: bool = False
    """tma: whether the next tile's loads start before this tile's statistics are done."""
    halves: bool = False
    """tma: whether exponentials are stored half a tile at a time: half the shared memory, so one stage more fits."""


POINTERS = "pointers"
"""Works on every GPU."""
_TMA_WAYS = {"tma": Way(True, 3, flatten=True), "tma_in_turn": Way(True, 3)}
_HALVES = {"tma_halves": Way(True, 4, flatten=True, halves=True)}


def ways(hidden: Tensor, weight: Tensor) -> dict[str, Way]:
    """The ways available for hidden [T, H] and weight [V, H], both contiguous."""
    found = {POINTERS: Way(num_stages=3 if hidden.dtype.itemsize > 2 or target_arch() == 90 else 4)}
    row_bytes = hidden.shape[1] * hidden.element_size()
    aligned = row_bytes % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in (hidden, weight))
    if 90 <= target_arch() < 120 and hidden.dtype.itemsize == 2 and aligned:  # on sm_120 triton 3.6's TMA loads spill
        found |= _TMA_WAYS | (_HALVES if target_arch() == 90 else {})  # on sm_100 it spills
    return found


class TileBuffers(NamedTuple):
    """What the forward product writes, per row and tile of columns."""

    maximum: Tensor
    """[R, tiles] float32: of z, the logits / temperature."""
    total: Tensor
    """[R, tiles] float32: Σ exp(z − maximum)."""
    weighted: Tensor | None
    """[R, tiles] float32: Σ log2(e) · (z − maximum) · exp(z − maximum)."""
    exponentials: Tensor | None
    """[R, tiles · columns] in hidden's dtype: exp(z − maximum), 0 past the vocabulary."""

    def rows(self, count: int) -> "TileBuffers":
        """The first `count` rows."""
        return TileBuffers(*(None if buffer is None else buffer[:count] for buffer in self))  # type: ignore[arg-type]


def tile_buffers(hidden: Tensor, rows: int, vocabulary: int, entropy: bool, keep: bool) -> TileBuffers:
    """Uninitialised buffers for so many rows of hidden."""
    columns = logits_tile(hidden.dtype).columns
    tiles = triton.cdiv(vocabulary, columns)
    maximum, total = (hidden.new_empty(rows, tiles, dtype=torch.float32) for _ in range(2))
    weighted = torch.empty_like(maximum) if entropy else None
    return TileBuffers(maximum, total, weighted, hidden.new_empty(rows, tiles * columns) if keep else None)


def launch_logits(
    hidden: Tensor, weight: Tensor, count: Tensor, buffers: TileBuffers, temperature: float, way: Way
) -> None:
    """Fills the buffers' first `count` rows from hidden [R, H] and weight [V, H]; other rows are undefined.

    Args:
        count: [1] int64, on the device, so that nothing is read back.
    """
    tile = logits_tile(hidden.dtype)
    n_rows, width = hidden.shape
    tiles = buffers.maximum.shape[1]
    if n_rows == 0 or tiles == 0:
        return
    blocks = triton.cdiv(n_rows, tile.rows) * tiles
    meta: dict[str, Any] = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.step}
    meta |= {"GROUP": _ROW_BLOCK_GROUP, "num_warps": tile.num_warps, "num_stages": way.num_stages}
    inverse_temperature, flops = 1.0 / temperature, 2.0 * n_rows * len(weight) * width
    if not way.tma:
        sizes = (n_rows, len(weight), width, tiles)
        args = (hidden, weight, count, *buffers, inverse_temperature, *sizes)
        launch(_logits_kernel, (blocks,), *args, flops=flops, **meta)
        return
    meta["BLOCK_K"] = 64
    programs = min(blocks, multiprocessors(hidden.device))
    statistics, exponentials = buffers[:3], buffers.exponentials
    if exponentials is not None:
        block = [tile.rows, tile.columns // 2 if way.halves else tile.columns]
        exponentials = TensorDescriptor.from_tensor(exponentials, block)
    launch(
        _logits_tma_kernel,
        (programs,),
        TensorDescriptor.from_tensor(hidden, [tile.rows, meta["BLOCK_K"]]),
        TensorDescriptor.from_tensor(weight, [tile.columns, meta["BLOCK_K"]]),
        count,
        *statistics,
        exponentials,
        inverse_temperature,
        len(weight),
        width,
        tiles,
        PROGRAMS=programs,
        FLATTEN=way.flatten,
        HALVES=way.halves,
        flops=flops,
        **meta,
    )


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, summed in float32. `out` has their dtype or float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # On a CPU, products of 16 bits do not come as float32.
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


@triton.jit
def _output_tile(
    index: tl.tensor,
    m_blocks: tl.tensor,
    n_blocks: tl.tensor,
    GROUP: tl.constexpr,
) -> Any:
    """Row block and column block of tile `index`: GROUP row blocks side by side, then the next column block."""
    in_group = GROUP * n_blocks
    first = index // in_group * GROUP
    height = tl.minimum(m_blocks - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def _statistics(
    z: tl.tensor,
    i: tl.tensor,
    tile: tl.tensor,
    column: tl.tensor,
    active: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor | None,
    inverse_temperature: tl.tensor,
    vocabulary: tl.tensor,
    n_tiles: tl.tensor,
) -> Any:
    """Stores a tile's statistics; returns its exponentials in float32."""
    z = tl.where((column < vocabulary)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    z = (z - tl.where(top == float("-inf"), 0.0, top)[:, None]) * (inverse_temperature * _LOG2_E)
    e = tl.exp2(z)
    at = i.to(tl.int64) * n_tiles + tile
    tl.store(maximum + at, top * inverse_temperature, mask=i < active)
    tl.store(total + at, tl.sum(e, 1), mask=i < active)
    if weighted is not None:
        # Not −inf: 0 · −inf is NaN.
        tl.store(weighted + at, tl.sum(e * tl.maximum(z, -1e4), 1), mask=i < active)
    return e


@triton.jit(do_not_specialize=["n_rows"])  # it differs from one micro-batch to the next
def _logits_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    count: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor | None,
    exponentials: tl.tensor | None,
    inverse_temperature: tl.tensor,
    n_rows: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    n_tiles: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    m_block, tile = _output_tile(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), n_tiles, GROUP)
    active = tl.load(count).to(tl.int32)
    if m_block * BLOCK_M >= active:
        return
    i = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat row and column 0, so that the loop masks k alone.
    hidden_at = hidden + tl.where(i < n_rows, i, 0).to(tl.int64)[:, None] * width + k[None, :]
    weight_at = weight + tl.where(column < vocabulary, column, 0).to(tl.int64)[None, :] * width + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        a = tl.load(hidden_at, mask=(k < width - start)[None, :], other=0.0)
        b = tl.load(weight_at, mask=(k < width - start)[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="tf32x3")
        hidden_at += BLOCK_K
        weight_at += BLOCK_K
    e = _statistics(z, i, tile, column, active, maximum, total, weighted, inverse_temperature, vocabulary, n_tiles)
    if exponentials is not None:
        place = exponentials + i.to(tl.int64)[:, None] * (n_tiles * BLOCK_N) + column[None, :]
        tl.store(place, e.to(exponentials.dtype.element_ty), mask=(i < active)[:, None])


@triton.jit
def _logits_tma_kernel(
    hidden: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    count: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor | None,
    exponentials: tl.tensor_descriptor | None,
    inverse_temperature: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    n_tiles: tl.tensor,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    active = tl.load(count).to(tl.int32)
    m_blocks = tl.cdiv(active, BLOCK_M)
    for index in tl.range(tl.program_id(0), m_blocks * n_tiles, PROGRAMS, flatten=FLATTEN):
        m_block, tile = _output_tile(index, m_blocks, n_tiles, GROUP)
        first_row = m_block * BLOCK_M
        first_column = tile * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, width, BLOCK_K):
            # 0 past the end of rows, columns and width.
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start])
            z = tl.dot(a, b.T, z)
        i = first_row + tl.arange(0, BLOCK_M)
        column = first_column + tl.arange(0, BLOCK_N)
        e = _statistics(z, i, tile, column, active, maximum, total, weighted, inverse_temperature, vocabulary, n_tiles)
        if exponentials is not None:
            if HALVES:
                left, right = tl.split(tl.permute(tl.reshape(e, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
                exponentials.store([first_row, first_column], left.to(exponentials.dtype))
                exponentials.store([first_row, first_column + BLOCK_N // 2], right.to(exponentials.dtype))
            else:
                exponentials.store([first_row, first_column], e.to(exponentials.dtype))
