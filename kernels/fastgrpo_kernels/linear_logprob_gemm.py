"""The three products behind `linear_logprob`: logits with their statistics, dhidden and dweight.

Logits exist in tiles of [rows, TILE columns] only. The forward product reduces each tile in its float32 accumulator
to a maximum, a sum and, for the entropy, a weighted sum. What it may keep for the backward pass is
e = exp(z − tile maximum) in hidden's dtype: its relative error is 2^-9 in bfloat16 whatever the logits' size, where
a logit of 32 itself would be off by 0.06. Then p = e · exp(tile maximum − lse).

Every kernel works through `order`, hidden rows with those that take part first, and stops at `count` of them: a
number on the device, so that nothing is read back.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.tl_utils import launch, target_arch

_ROW_BLOCK_GROUP = 16
"""Row blocks that share a column block side by side: their operands stay in L2 while the columns stream past."""


class GemmConfig(NamedTuple):
    """Tile of the output, step along the reduced dimension, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def gemm_config(dtype: torch.dtype) -> GemmConfig:
    """All three products': the largest that compile without spills, 128×256×64 on sm_90 alone."""
    if dtype.itemsize > 2:
        return GemmConfig(64, 128, 32, 8, 3)
    return GemmConfig(128, 256, 64, 8, 3) if target_arch() == 90 else GemmConfig(128, 128, 32, 8, 4)


class TileBuffers(NamedTuple):
    """What the forward product writes, per hidden row and tile of columns."""

    maximum: Tensor
    """[T, tiles] float32."""
    total: Tensor
    """[T, tiles] float32: Σ exp(z − maximum)."""
    weighted: Tensor | None
    """[T, tiles] float32: Σ (z − maximum) · exp(z − maximum)."""
    exponentials: Tensor | None
    """[T, tiles · columns] in hidden's dtype: exp(z − maximum), 0 past the vocabulary."""


def tile_buffers(hidden: Tensor, vocabulary: int, entropy: bool, keep: bool) -> TileBuffers:
    """Uninitialised buffers for hidden [T, H]."""
    columns = gemm_config(hidden.dtype).block_n
    tiles = triton.cdiv(vocabulary, columns)
    maximum, total = (hidden.new_empty(len(hidden), tiles, dtype=torch.float32) for _ in range(2))
    weighted = torch.empty_like(maximum) if entropy else None
    return TileBuffers(maximum, total, weighted, hidden.new_empty(len(hidden), tiles * columns) if keep else None)


def launch_logits(
    hidden: Tensor, weight: Tensor, order: Tensor, count: Tensor, buffers: TileBuffers, temperature: float
) -> None:
    """Fills the buffers' first `count` rows of `order` from hidden [T, H] and weight [V, H]."""
    config = gemm_config(hidden.dtype)
    tiles = buffers.maximum.shape[1]
    launch(
        _logits_kernel,
        (triton.cdiv(len(hidden), config.block_m) * tiles,),
        hidden,
        weight,
        order,
        count,
        *buffers,
        1.0 / temperature,
        len(hidden),
        len(weight),
        hidden.shape[1],
        tiles,
        **_meta(config),
    )


def launch_dhidden(dlogits: Tensor, weight: Tensor, order: Tensor, count: Tensor, dhidden: Tensor) -> None:
    """dhidden[row] = dlogits[row] @ weight for the first `count` rows of `order`."""
    config = gemm_config(dlogits.dtype)
    grid = triton.cdiv(len(dhidden), config.block_m) * triton.cdiv(weight.shape[1], config.block_n)
    sizes = (len(dhidden), *weight.shape, dlogits.shape[1])
    launch(_dhidden_kernel, (grid,), dlogits, weight, order, count, dhidden, *sizes, **_meta(config))


def launch_dweight(
    dlogits: Tensor, hidden: Tensor, order: Tensor, count: Tensor, dweight: Tensor, accumulate: bool
) -> None:
    """dweight (+)= dlogits[rows].T @ hidden[rows] over the first `count` rows of `order`."""
    config = gemm_config(dlogits.dtype)
    grid = triton.cdiv(len(dweight), config.block_m) * triton.cdiv(hidden.shape[1], config.block_n)
    sizes = (*dweight.shape, dlogits.shape[1])
    meta = _meta(config)
    launch(_dweight_kernel, (grid,), dlogits, hidden, order, count, dweight, *sizes, ACCUMULATE=accumulate, **meta)


def _meta(config: GemmConfig) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": _ROW_BLOCK_GROUP,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@triton.jit
def _output_tile(
    m_blocks: tl.tensor,
    n_blocks: tl.tensor,
    GROUP: tl.constexpr,
) -> Any:
    """Which tile of the output this program makes: GROUP row blocks side by side, then the next column block."""
    program = tl.program_id(0)
    in_group = GROUP * n_blocks
    first = program // in_group * GROUP
    height = tl.minimum(m_blocks - first, GROUP)
    return first + program % in_group % height, program % in_group // height


@triton.jit
def _logits_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
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
    m_block, tile = _output_tile(tl.cdiv(n_rows, BLOCK_M), n_tiles, GROUP)
    active = tl.load(count)
    if m_block * BLOCK_M >= active:
        return
    i = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(order + i, mask=i < active, other=0)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat row and column 0, so that the loop masks k alone.
    hidden_at = hidden + row[:, None] * width + k[None, :]
    weight_at = weight + tl.where(column < vocabulary, column, 0).to(tl.int64)[None, :] * width + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        a = tl.load(hidden_at, mask=(k < width - start)[None, :], other=0.0)
        b = tl.load(weight_at, mask=(k < width - start)[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="tf32x3")
        hidden_at += BLOCK_K
        weight_at += BLOCK_K

    z = tl.where((column < vocabulary)[None, :], z * inverse_temperature, float("-inf"))
    top = tl.max(z, 1)
    z -= tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp(z)
    row = tl.load(order + i, mask=i < active, other=0)  # again: to hold it through the loop costs registers that spill
    at = row * n_tiles + tile
    tl.store(maximum + at, top, mask=i < active)
    tl.store(total + at, tl.sum(e, 1), mask=i < active)
    if weighted is not None:
        # Not −inf: 0 · −inf is NaN.
        tl.store(weighted + at, tl.sum(e * tl.maximum(z, -1e4), 1), mask=i < active)
    if exponentials is not None:
        row = tl.load(order + i, mask=i < active, other=0)
        place = exponentials + row[:, None] * (n_tiles * BLOCK_N) + column[None, :]
        tl.store(place, e.to(exponentials.dtype.element_ty), mask=(i < active)[:, None])


@triton.jit
def _dhidden_kernel(
    dlogits: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
    count: tl.tensor,
    dhidden: tl.tensor,
    n_rows: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    m_block, n_block = _output_tile(tl.cdiv(n_rows, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    active = tl.load(count)
    if m_block * BLOCK_M >= active:
        return
    i = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(order + i, mask=i < active, other=0)
    # Rows past the end repeat the first that takes part: any other row may never have been written.
    row = tl.where(i < active, row, tl.load(order))
    h = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dlogits_at = dlogits + row[:, None] * row_stride + k[None, :]
    weight_at = weight + k.to(tl.int64)[:, None] * width + h[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, vocabulary, BLOCK_K):
        a = tl.load(dlogits_at)  # 0 past the vocabulary, and as wide as whole tiles
        b = tl.load(weight_at, mask=(k < vocabulary - start)[:, None] & (h < width)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        dlogits_at += BLOCK_K
        weight_at += BLOCK_K * width
    at = dhidden + row[:, None] * width + h[None, :]
    tl.store(at, acc.to(dhidden.dtype.element_ty), mask=(i < active)[:, None] & (h < width)[None, :])


@triton.jit
def _dweight_kernel(
    dlogits: tl.tensor,
    hidden: tl.tensor,
    order: tl.tensor,
    count: tl.tensor,
    dweight: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    m_block, n_block = _output_tile(tl.cdiv(vocabulary, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    active = tl.load(count)
    if ACCUMULATE and active == 0:
        return
    column = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    h = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, active, BLOCK_K):
        inside = (start + k < active)[:, None]
        row = tl.load(order + start + k, mask=start + k < active, other=0)[:, None]
        a = tl.load(dlogits + row * row_stride + column[None, :], mask=inside, other=0.0)
        b = tl.load(hidden + row * width + h[None, :], mask=inside & (h < width)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="tf32x3")
    at = dweight + column.to(tl.int64)[:, None] * width + h[None, :]
    wanted = (column < vocabulary)[:, None] & (h < width)[None, :]
    if ACCUMULATE:
        # No other program touches these: an addition that the memory does needs no registers for what was there.
        tl.atomic_add(at, acc, mask=wanted, sem="relaxed")
    else:
        tl.store(at, acc.to(dweight.dtype.element_ty), mask=wanted)
