"""The norm behind a product in parts: sums them, adds the residual, norms, in one kernel."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.early_launch import LINE, ask_for, early, wait_for_inputs
from fastgrpo_kernels.tl_utils import launch


def add_norm(
    hidden: Tensor, parts: Tensor | None, weight: Tensor, eps: float, *, backend: Backend | None = None
) -> Tensor:
    """hidden += Σ parts, in place, rounded once; then its RMSNorm, as `rms_norm` [T, H] in hidden's dtype.

    No gradients.

    Args:
        hidden: [T, H], contiguous, of any floating dtype, written in place.
        parts: [S, T, H] float32, of `thin_linear_parts`; None: nothing is added.
        weight: [H], of any floating dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or hidden is not contiguous.
    """
    fits = parts is None or (parts.shape[1:] == hidden.shape and parts.dtype == torch.float32)
    if hidden.ndim != 2 or weight.shape != hidden.shape[1:] or not fits:
        given = None if parts is None else f"{parts.dtype} {shape_of(parts)}"
        raise ValueError(
            f"hidden {shape_of(hidden)}, parts {given}, weight {shape_of(weight)} do not fit: pass [T, H], float32 "
            "[S, T, H] or None, and [H]."
        )
    if not hidden.is_contiguous():
        raise ValueError("hidden is not contiguous: it is written in place.")
    if pick_backend(hidden, backend) == "torch":
        return reference.add_norm(hidden, parts, weight, eps)
    found: Tensor = _operator(hidden, parts, weight, eps)
    return found


def _launch(hidden: Tensor, parts: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, width = hidden.shape
    y = torch.empty_like(hidden)
    if not y.numel():
        return y
    block = triton.next_power_of_2(width)
    launch(
        add_norm_kernel,
        (rows,),
        hidden,
        None if parts is None else parts.contiguous(),
        weight,
        y,
        rows,
        eps,
        PARTS=0 if parts is None else len(parts),
        HIDDEN=width,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        maxnreg=128,  # without it, ptxas of triton 3.6 spills to use 32
        **early(hidden),
    )
    return y


_operator = register_operator(
    "add_norm(Tensor(a!) hidden, Tensor? parts, Tensor weight, float eps) -> Tensor",
    _launch,
    lambda hidden, *_: torch.empty_like(hidden),
)


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    hidden: tl.tensor,
    parts: tl.tensor | None,
    weight: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    PARTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One row."""
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    if EARLY:
        line = tl.arange(0, max(BLOCK // LINE, 1)) * LINE
        ask_for(weight + tl.minimum(line, HIDDEN - 1))
    wait_for_inputs(EARLY)
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    row = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            row += tl.load(parts + part * rows.to(tl.int64) * HIDDEN + at, mask=inside, other=0.0)
        rounded = row.to(hidden.dtype.element_ty)
        tl.store(hidden + at, rounded, mask=inside)
        row = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / HIDDEN + eps)
    result = row * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: 2B and 7B, with as many parts as any way makes."""

    def case(hidden: int, parts: int) -> Callable[[], None]:
        def run() -> None:
            x = torch.empty(64, hidden, dtype=torch.bfloat16, device="meta")
            _launch(x, x.new_empty(parts, 64, hidden, dtype=torch.float32) if parts else None, x[0], 1e-6)

        return run

    for hidden in (1536, 3584):
        for parts in (0, 1, 4, 5):
            yield f"add_norm H={hidden}, {parts} parts", case(hidden, parts)
