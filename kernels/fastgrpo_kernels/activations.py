"""Activations of gated and plain MLPs in one pass each; their backward passes recompute from the inputs."""

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

BLOCK, WARPS = 1024, 4
"""Elements of a program: 16 bytes of half precision for each of its threads."""


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """silu(gate) · up [..., I], in their dtype, computed in float32 and rounded once; differentiable.

    Raises:
        ValueError: gate and up differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {gate.dtype} {shape_of(gate)} does not fit up {up.dtype} {shape_of(up)}: pass the same shape and "
            "dtype."
        )
    if pick_backend(gate, backend) == "torch":
        return cpu.swiglu(gate, up)
    out: Tensor = _Swiglu.apply(gate, up)
    return out


def quick_gelu(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """x · sigmoid(1.702 x), in x's dtype, computed in float32 and rounded once; differentiable."""
    if pick_backend(x, backend) == "torch":
        return reference.quick_gelu(x)
    out: Tensor = _QuickGelu.apply(x)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = _swiglu_operator(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _swiglu_backward_operator(grad_out, *ctx.saved_tensors)
        return found


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = _quick_gelu_operator(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        found: Tensor = _quick_gelu_backward_operator(grad_out, *ctx.saved_tensors)
        return found


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Rows of the inputs [..., I] need not be adjacent: gate and up may be halves of one tensor."""
    if not inputs[0].numel():
        return
    # Contiguous inputs are treated as one long row, whose start is aligned for any I.
    width = inputs[0].numel() if all(x.is_contiguous() for x in inputs) else inputs[0].shape[-1]
    rows = [_rows(x, width) for x in inputs]
    blocks = -(-width // BLOCK)  # triton.cdiv is too slow on the host
    strides = [x.stride(0) for x in rows]
    launch(kernel, (len(rows[0]) * blocks,), *rows, *outputs, *strides, width, BLOCK=BLOCK, num_warps=WARPS)


def _rows(x: Tensor, width: int) -> Tensor:
    """[rows, width] with contiguous rows; copies only if needed."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    _launch(_swiglu_kernel, (gate, up), (out,))
    return out


def _swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(_swiglu_backward_kernel, (grad_out, gate, up), (dgate, dup))
    return dgate, dup


def _quick_gelu(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _launch(_quick_gelu_kernel, (x,), (out,))
    return out


def _quick_gelu_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    _launch(_quick_gelu_backward_kernel, (grad_out, x), (dx,))
    return dx


def _like_first(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _like_both(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_swiglu_operator = register_operator("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, _like_first)
_swiglu_backward_operator = register_operator(
    "swiglu_backward(Tensor grad_out, Tensor gate, Tensor up) -> (Tensor, Tensor)", _swiglu_backward, _like_both
)
_quick_gelu_operator = register_operator("quick_gelu(Tensor x) -> Tensor", _quick_gelu, _like_first)
_quick_gelu_backward_operator = register_operator(
    "quick_gelu_backward(Tensor grad_out, Tensor x) -> Tensor", _quick_gelu_backward, _like_first
)


@triton.jit
def _place(width: tl.tensor, BLOCK: tl.constexpr) -> Any:
    """This program's row and columns (int64), and which columns are inside the row."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, column, column < width


@triton.jit
def _swiglu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, column, inside = _place(width, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    grad_out: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, column, inside = _place(width, BLOCK)
    gradient = tl.load(grad_out + row * grad_stride + column, mask=inside).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    at = row * width + column
    tl.store(dup + at, (gradient * g * sigmoid).to(dup.dtype.element_ty), mask=inside)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + at, (gradient * u * slope).to(dgate.dtype.element_ty), mask=inside)


@triton.jit
def _quick_gelu_kernel(
    x: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, column, inside = _place(width, BLOCK)
    wide = tl.load(x + row * stride + column, mask=inside).to(tl.float32)
    result = wide * tl.sigmoid(1.702 * wide)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quick_gelu_backward_kernel(
    grad_out: tl.tensor,
    x: tl.tensor,
    dx: tl.tensor,
    grad_stride: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, column, inside = _place(width, BLOCK)
    gradient = tl.load(grad_out + row * grad_stride + column, mask=inside).to(tl.float32)
    wide = tl.load(x + row * stride + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(1.702 * wide)
    slope = sigmoid * (1.0 + 1.702 * wide * (1.0 - sigmoid))
    tl.store(dx + row * width + column, (gradient * slope).to(dx.dtype.element_ty), mask=inside)


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launchers on meta tensors: MLPs of the text layers of 2B and 7B and of the vision blocks."""

    def case(operation: Callable[..., Any], count: int, width: int) -> Callable[[], None]:
        def run() -> None:
            x = torch.empty(16384, width, dtype=torch.bfloat16, device="meta")
            operation(*[x] * count)

        return run

    for width in (8960, 18944, 3420):
        yield f"swiglu I={width}", case(_swiglu, 2, width)
        yield f"swiglu backward I={width}", case(_swiglu_backward, 3, width)
    yield "quick_gelu I=5120", case(_quick_gelu, 1, 5120)
    yield "quick_gelu backward I=5120", case(_quick_gelu_backward, 2, 5120)
