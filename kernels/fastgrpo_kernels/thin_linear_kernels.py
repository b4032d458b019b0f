"""Products of few rows with a large weight, as decoding makes them: bound by reading the weight once.

The weights of a layer of the 2B model are 93.6 MB, 31.5 us at 2.97 TB/s. On an H100, 64 rows, cuBLAS took 4 to 8 us a
product beyond that. These have programs enough to keep the memory busy, compute the gated activation, leave the sums of
a divided reduction to the norm behind, and ask for weights before the kernel in front has ended.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgrpo_kernels.early_launch import LINE, ask_for, early, wait_for_inputs
from fastgrpo_kernels.tl_utils import launch, target_arch

Kind = Literal["plain", "parts", "gated"]

AHEAD = tl.constexpr(4)
"""Cache lines of each column's weights that are asked for early: the best of 0, 4, 8 and 16 on an H100."""


class Way(NamedTuple):
    """How a product is cut."""

    columns: int
    """A program's, of gate and up each."""
    step: int
    """Along the reduced dimension."""
    stages: int
    """Steps being loaded to shared memory at once, at most."""
    parts: int = 1
    """Of the reduced dimension."""
    tma: bool = False
    """Whether to load by the tensor memory accelerator."""

    @property
    def name(self) -> str:
        return f"{self.columns}×{self.step}, {self.stages} stages, {self.parts} parts{', tma' * self.tma}"


_WAYS: dict[Kind, tuple[Way, ...]] = {
    "plain": (Way(16, 128, 5), Way(32, 128, 5), Way(64, 64, 4), Way(16, 128, 5, tma=True)),
    "parts": (
        Way(32, 128, 3, 4),
        Way(16, 128, 5),
        Way(32, 128, 3, 4, tma=True),
        Way(32, 128, 4, 5, tma=True),
        Way(64, 128, 4, 5, tma=True),
    ),
    "gated": (Way(32, 64, 4), Way(32, 64, 4, tma=True), Way(64, 64, 4, tma=True)),
}
"""The fastest that an H100 has shown for the 2B model, by pointers and by TMA; wider ones for the 7B model. Larger
tiles by pointers spill before sm_90 and on sm_120."""


def ways(kind: Kind, has_tma: bool = True) -> dict[str, Way]:
    """By name, those that the GPU has."""
    has_tma = has_tma and 90 <= target_arch() < 120
    return {way.name: way for way in _WAYS[kind] if has_tma or not way.tma}


def launch_thin(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    """The product of the kind, see `thin_linear.py`; inputs are contiguous and of half precision, and not checked."""
    rows, width = x.shape
    columns = len(weight) // 2 if kind == "gated" else len(weight)
    is_parts = kind == "parts"
    shape = (way.parts, rows, columns) if is_parts else (rows, columns)
    out = x.new_empty(shape, dtype=torch.float32 if is_parts else x.dtype)
    if not out.numel():
        return out
    assert is_parts or way.parts == 1
    block_m = 64 if rows <= 64 else 128
    step_bytes = 2 * way.step * (block_m + way.columns * (2 if kind == "gated" else 1))
    a: Any = x
    b: Any = weight
    if way.tma:
        a = TensorDescriptor.from_tensor(x, [block_m, way.step])
        b = TensorDescriptor.from_tensor(weight, [way.columns, way.step])
    launch(
        thin_linear_kernel,
        (triton.cdiv(columns, way.columns) * triton.cdiv(rows, block_m) * way.parts,),
        a,
        b,
        weight,
        bias,
        out,
        rows,
        columns,
        WIDTH=width,
        PARTS=way.parts,
        GATED=kind == "gated",
        TMA=way.tma,
        BLOCK_M=block_m,
        BLOCK_N=way.columns,
        BLOCK_K=way.step,
        num_warps=block_m // 16,
        maxnreg=255 if block_m == 128 else None,  # without it, ptxas of triton 3.6 spills to use 64
        num_stages=min(way.stages, _shared_bytes() // step_bytes),
        **early(x),
        flops=2.0 * rows * weight.numel(),
    )
    return out


def _shared_bytes() -> int:
    """What a block may take of shared memory for its steps; GPUs that are not for servers have less."""
    return (160 if target_arch() in (80, 90, 100) else 98) << 10


@triton.jit(do_not_specialize=["rows"])
def thin_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_at: tl.tensor,
    bias: tl.tensor | None,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A tile of columns for a block of rows, over a part of the reduced dimension.

    TMA: x and weight are descriptors, which give 0 outside. `weight_at` is the weight's address in any case.
    """
    PART: tl.constexpr = (WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    program = tl.program_id(0)
    part = program % PARTS
    blocks = tl.cdiv(rows, BLOCK_M)
    m = program // PARTS % blocks * BLOCK_M
    n = program // PARTS // blocks * BLOCK_N
    begin = part * PART
    row = m + tl.arange(0, BLOCK_M)
    column = n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = column < columns
    # Outside, row and column 0 are read, and nothing is written.
    column_at = tl.where(inside, column, 0).to(tl.int64) * WIDTH
    up = columns.to(tl.int64) * WIDTH
    if EARLY:
        line = tl.minimum(begin + tl.arange(0, AHEAD) * LINE, WIDTH - 1)
        ask_for(weight_at + column_at[:, None] + line[None, :])
        if GATED:
            ask_for(weight_at + up + column_at[:, None] + line[None, :])
    wait_for_inputs(EARLY)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_at = tl.where(row < rows, row, 0).to(tl.int64)[:, None] * WIDTH + k[None, :]
    w_at = column_at[None, :] + k[:, None]
    for start in range(begin, min(begin + PART, WIDTH), BLOCK_K):
        if TMA:
            a = x.load([m, start])
            acc = tl.dot(a, weight.load([n, start]).T, acc)
            if GATED:
                acc_up = tl.dot(a, weight.load([columns + n, start]).T, acc_up)
        elif WIDTH % BLOCK_K == 0:
            a = tl.load(x + x_at + start)
            acc = tl.dot(a, tl.load(weight + w_at + start), acc)
            if GATED:
                acc_up = tl.dot(a, tl.load(weight + up + w_at + start), acc_up)
        else:
            seen = k < WIDTH - start
            a = tl.load(x + x_at + start, mask=seen[None, :], other=0.0)
            acc = tl.dot(a, tl.load(weight + w_at + start, mask=seen[:, None], other=0.0), acc)
            if GATED:
                acc_up = tl.dot(a, tl.load(weight + up + w_at + start, mask=seen[:, None], other=0.0), acc_up)
    if GATED:
        acc = acc * tl.sigmoid(acc) * acc_up
    if bias is not None:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = out + (part.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: a layer of 2B and 7B for 64 rows (8 rows run its code), 2B for 128."""

    def case(kind: Kind, rows: int, columns: int, width: int, name: str) -> Callable[[], None]:
        def run() -> None:
            x, weight = (torch.empty(n, width, dtype=torch.bfloat16, device="meta") for n in (rows, columns))
            if name in ways(kind):
                bias = x.new_empty(columns) if kind == "plain" else None
                launch_thin(kind, x, weight, bias, ways(kind)[name])

        return run

    small, large = (1536, 8960, 2048), (3584, 18944, 4608)
    for rows, (hidden, intermediate, packed) in ((64, small), (64, large), (128, small)):
        shapes: tuple[tuple[Kind, int, int], ...] = (
            ("plain", packed, hidden),
            ("parts", hidden, hidden),
            ("parts", hidden, intermediate),
            ("gated", 2 * intermediate, hidden),
        )
        for kind, columns, width in shapes:
            for way in _WAYS[kind]:
                yield f"{kind} {rows} {columns}×{width} {way.name}", case(kind, rows, columns, width, way.name)
