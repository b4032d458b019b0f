"""RMSNorm and LayerNorm, fused with the addition of a residual before them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo_kernels import cpu, reference
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.tl_utils import launch

ROWS_PER_PROGRAM, MOST_PROGRAMS = 8, 512
"""Backward pass: each program sums its rows' share of the weight's gradient, float32 [H], for a last sum over programs.
So few that these sums are a small part of what is moved, and so many that a GPU holds about all of them at once: four
of 4 warps on each multiprocessor, for their registers."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """y = s / √(mean s² + eps) · weight, and s = x + residual (x itself without one); differentiable.

    Computed in float32 and rounded once. Use the returned s wherever else the sum is needed: its gradient is then added
    in the same pass.

    Args:
        x: [..., H], of any floating dtype, that of both results.
        weight: [H], of any floating dtype, like its gradient, which is summed in float32.
        residual: of x's shape and dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, residual, weight)
    if pick_backend(x, backend) == "torch":
        return cpu.rms_norm(x, weight, eps, residual)
    found: tuple[Tensor, Tensor] = _Norm.apply(x, residual, weight, None, eps)
    return found


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (s − mean s) / √(var s + eps) · weight + bias, and s = x + residual; else as `rms_norm`."""
    _check(x, residual, weight, bias)
    if pick_backend(x, backend) == "torch":
        return reference.layer_norm(x, weight, bias, eps, residual)
    found: tuple[Tensor, Tensor] = _Norm.apply(x, residual, weight, bias, eps)
    return found


def _check(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> None:
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual {residual.dtype} {shape_of(residual)} does not fit x {x.dtype} {shape_of(x)}: pass the same."
        )
    for parameter in parameters:
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"weight or bias {shape_of(parameter)} does not fit x {shape_of(x)}: pass [H].")


class _Norm(torch.autograd.Function):
    """RMSNorm without a bias, else LayerNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total = _forward_operator(x, residual, weight, bias, eps)
        total = x if residual is None else total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.centered, ctx.added = eps, bias is not None, residual is not None
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return grad_total, grad_total if ctx.added else None, None, None, None
        total, weight = ctx.saved_tensors
        needs_weight = any(ctx.needs_input_grad[2:4])
        dx, dweight, dbias = _backward_operator(grad_y, grad_total, total, weight, ctx.eps, ctx.centered, needs_weight)
        return (
            dx,
            dx if ctx.added else None,
            dweight if ctx.needs_input_grad[2] else None,
            dbias if ctx.needs_input_grad[3] else None,
            None,
        )


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, total = _fake_forward(x, residual, weight, bias, eps)
    hidden = x.shape[-1]
    if x.numel():
        launch(
            _forward_kernel,
            (x.numel() // hidden,),
            x,
            x if residual is None else residual.contiguous(),
            weight,
            weight if bias is None else bias,
            y,
            total,
            eps,
            ADDS=residual is not None,
            CENTERED=bias is not None,
            **_tile(hidden),
        )
    return y, total


def _fake_forward(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    centered: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, total = grad_y.contiguous(), total.contiguous()
    hidden = total.shape[-1]
    rows = total.numel() // hidden
    programs = min(triton.cdiv(rows, ROWS_PER_PROGRAM), MOST_PROGRAMS)
    dx = torch.empty_like(total)
    kinds = (2 if centered else 1) if needs_weight else 0
    partial = total.new_empty((max(kinds, 1), programs if kinds else 0, hidden), dtype=torch.float32)
    if rows:
        launch(
            _backward_kernel,
            (programs,),
            grad_y,
            grad_y if grad_total is None else grad_total.contiguous(),
            total,
            weight,
            dx,
            partial,
            rows,
            eps,
            ADDS=grad_total is not None,
            CENTERED=centered,
            NEEDS_WEIGHT=needs_weight,
            **_tile(hidden),
        )
    if not needs_weight:
        return dx, weight.new_empty(0), weight.new_empty(0)
    sums = partial.sum(dim=1).to(weight.dtype)
    return dx, sums[0].clone() if centered else sums[0], sums[1].clone() if centered else weight.new_empty(0)


def _fake_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, centered: bool, needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape if needs else 0),
        weight.new_empty(weight.shape if needs and centered else 0),
    )


@functools.cache
def _tile(hidden: int) -> dict[str, int]:
    """16 elements a thread, so that what a row needs stays in registers."""
    block = triton.next_power_of_2(hidden)
    return {"HIDDEN": hidden, "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


_forward_operator = register_operator(
    "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_operator = register_operator(
    "norm_backward(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor weight, float eps, bool centered, "
    "bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


@triton.jit
def _statistics(x: tl.tensor, inside: tl.tensor, eps: tl.tensor, HIDDEN: tl.constexpr, CENTERED: tl.constexpr) -> Any:
    """A row less its mean (if CENTERED; 0 outside of it) and the factor that makes its variance 1."""
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, axis=0) / HIDDEN, 0.0)
    return x, tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    CENTERED: tl.constexpr,
) -> None:
    """One row."""
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)  # the backward pass starts from these
        tl.store(total + at, rounded, mask=inside)
        row = rounded.to(tl.float32)
    row, scale = _statistics(row, inside, eps, HIDDEN, CENTERED)
    result = row * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # it differs from one micro-batch to the next
def _backward_kernel(
    grad_y: tl.tensor,
    grad_total: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    CENTERED: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
) -> None:
    """Every so many-th row; `partial` [1 or 2, programs, HIDDEN] takes the sums for weight and bias.

    With n the normed row and g = grad_y · weight: dx = scale · (g − n · mean(g · n) [− mean g]) + grad_total.
    """
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    wide_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for i in range(tl.cdiv(rows - program, programs)):
        at = (program + i * programs) * HIDDEN + column
        row = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        row, scale = _statistics(row, inside, eps, HIDDEN, CENTERED)
        normed = row * scale
        scaled = gradient * wide_weight
        result = scaled - normed * (tl.sum(scaled * normed, axis=0) / HIDDEN)
        if CENTERED:
            result -= tl.sum(scaled, axis=0) / HIDDEN
        result *= scale
        if ADDS:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        if NEEDS_WEIGHT:
            dweight += gradient * normed
            if CENTERED:
                dbias += gradient
    if NEEDS_WEIGHT:
        tl.store(partial + program * HIDDEN + column, dweight, mask=inside)
        if CENTERED:
            tl.store(partial + (programs + program) * HIDDEN + column, dbias, mask=inside)


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launchers on meta tensors: text layers of 2B and 7B, vision blocks."""

    def case(hidden: int, centered: bool, dtype: torch.dtype, adds: bool, needs_weight: bool) -> Callable[[], None]:
        def run() -> None:
            x = torch.empty(16384, hidden, dtype=torch.bfloat16, device="meta")
            weight = torch.empty(hidden, dtype=dtype, device="meta")
            _forward(x, x if adds else None, weight, weight if centered else None, 1e-6)
            _backward(x, x if adds else None, x, weight, 1e-6, centered, needs_weight)

        return run

    for hidden, centered in ((1536, False), (3584, False), (1280, True)):
        name = f"{'layer_norm' if centered else 'rms_norm'} H={hidden}"
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{name} weight {dtype}", case(hidden, centered, dtype, True, True)
        yield f"{name}, nothing added, frozen", case(hidden, centered, torch.float32, False, False)
