"""What `linear_logprob` computes per row and per target, between its products: see `linear_logprob_gemm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.linear_logprob_gemm import TileBuffers, gemm_config
from fastgrpo_kernels.tl_utils import launch

_TILES_PER_PROGRAM = 8
"""Of the elementwise pass over a row."""


def launch_reduce(order: Tensor, count: Tensor, buffers: TileBuffers, lse: Tensor, entropy: Tensor) -> None:
    """From the tiles' statistics to the rows': lse [T] and, where weighted sums were kept, entropy [T]."""
    rows, tiles = buffers.maximum.shape
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
    launch(_target_kernel, (len(targets),), *tensors, 1.0 / temperature, ignore_index, *sizes, BLOCK=1024, num_warps=4)


def launch_dlogits(
    order: Tensor,
    count: Tensor,
    buffers: TileBuffers,
    lse: Tensor,
    row_entropy: Tensor,
    readers: tuple[Tensor, Tensor, Tensor, Tensor],
    first: int,
    temperature: float,
    entropy: bool,
    dtype: torch.dtype,
) -> None:
    """Turns exponentials into the gradient of logits, in place.

    Args:
        readers: the targets, their gradients of log-prob and of entropy [N], sorted by the row that they read; and
            [rows + 1], where each row's begin.
        first: which row of the last of these is the buffers' row 0.
    """
    columns = gemm_config(dtype).block_n
    rows, tiles = buffers.maximum.shape
    launch(
        _dlogits_kernel,
        (rows, triton.cdiv(tiles, _TILES_PER_PROGRAM)),
        order,
        count,
        buffers.exponentials,
        buffers.maximum,
        lse,
        row_entropy,
        *readers[:3],
        readers[3][first:],
        1.0 / temperature,
        tiles,
        ENTROPY=entropy,
        TILES=_TILES_PER_PROGRAM,
        COLUMNS=columns,
        num_warps=4,
    )


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
    row = tl.load(order + i)
    tile = tl.arange(0, BLOCK)
    at = row * n_tiles + tile
    top = tl.load(maximum + at, mask=tile < n_tiles, other=float("-inf"))
    part = tl.load(total + at, mask=tile < n_tiles, other=0.0)
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    share = part * tl.exp(top - shift)
    whole = tl.sum(share, 0)
    row_lse = shift + tl.log(whole)
    tl.store(lse + row, row_lse)
    if weighted is not None:
        # Σ −p log p over the tile; every term is ≥ 0, so large logits cancel nothing.
        mean = tl.load(weighted + at, mask=tile < n_tiles, other=0.0) / part
        terms = tl.where(share > 0, share / whole * (row_lse - top - mean), 0.0)
        tl.store(entropy + row, tl.sum(terms, 0))


@triton.jit
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


@triton.jit
def _dlogits_kernel(
    order: tl.tensor,
    count: tl.tensor,
    exponentials: tl.tensor,
    maximum: tl.tensor,
    lse: tl.tensor,
    row_entropy: tl.tensor,
    targets: tl.tensor,
    grad_logprobs: tl.tensor,
    grad_entropy: tl.tensor,
    begins: tl.tensor,
    inverse_temperature: tl.tensor,
    n_tiles: tl.tensor,
    ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    i = tl.program_id(0)
    if i >= tl.load(count):
        return
    row = tl.load(order + i)
    begin = tl.load(begins + row)
    end = tl.load(begins + row + 1)
    by_row = 0.0
    entropy_by_row = 0.0
    for n in range(begin, end):
        by_row += tl.load(grad_logprobs + n)
        entropy_by_row += tl.load(grad_entropy + n)

    row_lse = tl.load(lse + row)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    inside = (tile < n_tiles)[:, None]
    shift = tl.load(maximum + row * n_tiles + tile, mask=tile < n_tiles, other=float("-inf")) - row_lse
    column = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = exponentials + row * (n_tiles * COLUMNS) + column
    e = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    p = e * tl.exp(shift)[:, None]
    gradient = -p * by_row
    if ENTROPY:
        # log p from the stored exponential: no logit was kept. 0 · log 0 counts as 0.
        logp = tl.log(tl.where(e > 0, e, 1.0)) + tl.where(shift == float("-inf"), 0.0, shift)[:, None]
        gradient -= p * entropy_by_row * (logp + tl.load(row_entropy + row))
    for n in range(begin, end):
        gradient += tl.where(column == tl.load(targets + n), tl.load(grad_logprobs + n), 0.0)
    tl.store(at, (gradient * inverse_temperature).to(exponentials.dtype.element_ty), mask=inside)
