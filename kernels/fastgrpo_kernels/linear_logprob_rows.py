"""The per-row and per-target passes of `linear_logprob` between its products (see `linear_logprob_gemm`)."""

import math

import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.linear_logprob_gemm import TileBuffers, logits_tile
from fastgrpo_kernels.tl_utils import bytes_of, launch

_COLUMNS_PER_PROGRAM = 4096
"""Columns per program of the elementwise pass: 16 per thread, in two accesses of 16 bytes."""
_LN_2 = tl.constexpr(math.log(2.0))


def launch_reduce(order: Tensor, count: Tensor, buffers: TileBuffers, lse: Tensor, entropy: Tensor) -> None:
    """From the tiles' statistics to the rows': lse [T] and, where weighted sums were kept, entropy [T].

    Args:
        order: [R] int64, the hidden row that each of the buffers' is.
        count: [1] int64, how many of these were computed; no other row's lse is set.
    """
    rows, tiles = buffers.maximum.shape
    if rows and tiles:
        args = (order, count, *buffers[:3], lse, entropy, tiles)
        launch(_reduce_kernel, (rows,), *args, BLOCK=triton.next_power_of_2(tiles), num_warps=4)


def launch_targets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    row_entropy: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    """Writes log-probs and entropies [N]: each target's logit is one dot product beside the rows' statistics."""
    tensors = (hidden, weight, targets, rows, lse, row_entropy, logprobs, entropy)
    sizes = (*hidden.shape, len(weight))
    args = (*tensors, 1.0 / temperature, ignore_index, *sizes)
    moved = bytes_of(*tensors[2:]) + 2 * len(targets) * hidden.shape[1] * hidden.element_size()
    launch(_target_kernel, (len(targets),), *args, moved=moved, BLOCK=1024, num_warps=4)


def launch_dlogits(
    order: Tensor,
    live: Tensor,
    exponentials: Tensor,
    maximum: Tensor,
    lse: Tensor,
    row_entropy: Tensor,
    readers: tuple[Tensor, Tensor, Tensor, Tensor],
    first_column: int,
    temperature: float,
    entropy: bool,
) -> None:
    """Turns exponentials [R, C] into the gradient of logits, in place: each is read once and written once.

    4·R·C bytes in bfloat16: 10 GB for 16,384 rows and 151,936 columns, 3.4 ms at the 2.97 TB/s of an H100's copies.

    Args:
        order: [R] int64, the hidden row that each is.
        live: [R] bool, which have a gradient; the others are set to 0, whatever they held.
        maximum: [R, tiles]
        lse: [T]
        row_entropy: [T]
        readers: the targets, their gradients of log-prob and of entropy [N], sorted by the row that they read; and
            [T + 1], where each row's begin.
        first_column: which of the vocabulary is the buffer's column 0.
    """
    rows, columns = exponentials.shape
    if rows == 0 or columns == 0:
        return
    blocks = triton.cdiv(columns, _COLUMNS_PER_PROGRAM)
    width = logits_tile(exponentials.dtype).columns
    tensors = (order, live, exponentials, maximum, lse, row_entropy, *readers)
    meta = {"TILES": _COLUMNS_PER_PROGRAM // width, "COLUMNS": width, "num_warps": 8}
    sizes = (first_column, blocks, maximum.shape[1])
    args, moved = (*tensors, 1.0 / temperature, *sizes), bytes_of(*tensors) + exponentials.nbytes
    launch(_dlogits_kernel, (rows * blocks,), *args, moved=moved, ENTROPY=entropy, **meta)


@triton.jit
def _reduce_kernel(
    order: tl.tensor,
    count: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor | None,
    lse: tl.tensor,
    entropy: tl.tensor,
    n_tiles: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0)
    if i >= tl.load(count):
        return
    tile = tl.arange(0, BLOCK)
    at = i.to(tl.int64) * n_tiles + tile
    top = tl.load(maximum + at, mask=tile < n_tiles, other=float("-inf"))
    part = tl.load(total + at, mask=tile < n_tiles, other=0.0)
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    share = part * tl.exp(top - shift)
    whole = tl.sum(share, 0)
    row_lse = shift + tl.log(whole)
    row = tl.load(order + i)
    tl.store(lse + row, row_lse)
    if weighted is not None:
        # Σ −p log p over the tile; every term is ≥ 0, so large logits cancel nothing.
        mean = tl.load(weighted + at, mask=tile < n_tiles, other=0.0) * _LN_2 / part
        terms = tl.where(share > 0, share / whole * (row_lse - top - mean), 0.0)
        tl.store(entropy + row, tl.sum(terms, 0))


# Rows, and views that start behind some of them, differ from one micro-batch to the next.
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["logprobs", "entropy"])
def _target_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    targets: tl.tensor,
    rows: tl.tensor,
    lse: tl.tensor,
    row_entropy: tl.tensor,
    logprobs: tl.tensor,
    entropy: tl.tensor,
    inverse_temperature: tl.tensor,
    ignore_index: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0)
    target = tl.load(targets + n)
    row = tl.load(rows + n)
    exists = (target >= 0) & (target < vocabulary) & (row >= 0) & (row < n_rows)
    safe_target = tl.where(exists, target, 0)
    safe_row = tl.where(exists, row, 0)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + safe_row * width + k, mask=k < width, other=0.0).to(tl.float32)
        products += x * tl.load(weight + safe_target * width + k, mask=k < width, other=0.0).to(tl.float32)
    row_lse = tl.load(lse + safe_row)
    logprob = tl.sum(products, 0) * inverse_temperature - row_lse
    # The dot product sums in another order than the logits' tiles did: a certain target could come out just above 0.
    logprob = tl.where(logprob > 0, 0.0, logprob)
    logprob = tl.where(row_lse == float("-inf"), float("-inf"), logprob)
    logprob = tl.where(exists, logprob, float("nan"))
    counted = target != ignore_index
    tl.store(logprobs + n, tl.where(counted, logprob, 0.0))
    tl.store(entropy + n, tl.where(counted, tl.load(row_entropy + safe_row), 0.0))


@triton.jit(do_not_specialize_on_alignment=["grad_logprobs", "grad_entropy"])
def _dlogits_kernel(
    order: tl.tensor,
    live: tl.tensor,
    exponentials: tl.tensor,
    maximum: tl.tensor,
    lse: tl.tensor,
    row_entropy: tl.tensor,
    targets: tl.tensor,
    grad_logprobs: tl.tensor,
    grad_entropy: tl.tensor,
    begins: tl.tensor,
    inverse_temperature: tl.tensor,
    first_column: tl.tensor,
    blocks: tl.tensor,
    n_tiles: tl.tensor,
    ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # Adjacent programs share a row, so memory is accessed in order.
    i = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * TILES + tl.arange(0, TILES)
    inside = (tile < n_tiles)[:, None]
    column = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = exponentials + i * (n_tiles * COLUMNS) + column
    if tl.load(live + i) == 0:
        tl.store(at, tl.zeros((TILES, COLUMNS), exponentials.dtype.element_ty), mask=inside)
        return
    # Issued first, since the loads below depend on each other.
    e = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(maximum + i * n_tiles + tile, mask=tile < n_tiles, other=float("-inf"))
    row = tl.load(order + i)
    begin = tl.load(begins + row)
    end = tl.load(begins + row + 1)
    by_row = 0.0
    entropy_by_row = 0.0
    for n in range(begin, end):
        by_row += tl.load(grad_logprobs + n)
        entropy_by_row += tl.load(grad_entropy + n)

    shift = top - tl.load(lse + row)
    p = e * tl.exp(shift)[:, None]
    gradient = -p * by_row
    if ENTROPY & (entropy_by_row != 0.0):
        # log p from the stored exponential: no logit was kept. 0 · log 0 counts as 0.
        logp = tl.log(tl.where(e > 0, e, 1.0)) + tl.where(shift == float("-inf"), 0.0, shift)[:, None]
        gradient -= p * entropy_by_row * (logp + tl.load(row_entropy + row))
    start = tl.program_id(0) % blocks * (TILES * COLUMNS)
    for n in range(begin, end):
        place = tl.load(targets + n) - first_column
        if (place >= start) & (place < start + TILES * COLUMNS):  # few programs: the rest is spared the comparisons
            gradient += tl.where(column == place, tl.load(grad_logprobs + n), 0.0)
    tl.store(at, (gradient * inverse_temperature).to(exponentials.dtype.element_ty), mask=inside)
