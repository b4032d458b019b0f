"""A decode step's matrix products, of few rows in half precision: by cuBLAS or by kernels of ours, as measured here.

    y = add_norm(hidden, thin_linear_parts(attended, weights.out), weights.post_norm, eps)
    parts = thin_linear_parts(thin_gated_linear(y, weights.gate_up), weights.down)

No gradients.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.activations import swiglu
from fastgrpo_kernels.autopick import pick
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.thin_linear_kernels import Kind, launch_thin, ways

MOST_ROWS = 128
"""More rows read the weight more than once: they are not thin."""

CUBLAS = "cublas"
MOST_COPIES = 32
"""Of a weight, made to time ways."""


def is_thin(x: Tensor) -> bool:
    """Whether products with x [T, K] gain by the ops here: CUDA, half precision, at most MOST_ROWS rows."""
    return pick_backend(x) == "triton" and x.element_size() == 2 and len(x) <= MOST_ROWS


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """x weightᵀ + bias [T, N] in x's dtype.

    Args:
        x: [T, K], of any floating dtype; at most MOST_ROWS rows on a GPU.
        weight: [N, K], contiguous, of x's dtype.
        bias: [N], of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, a weight that is not contiguous, and, on a GPU, float32 or too
            many rows.
    """
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {shape_of(bias)} does not fit weight {shape_of(weight)}: pass [N].")
    return _call("plain", x, weight, bias, backend)


def thin_linear_parts(x: Tensor, weight: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[S, T, N] float32, whose sum over S is x weightᵀ, not rounded; for `add_norm`. Else as `thin_linear`."""
    return _call("parts", x, weight, None, backend)


def thin_gated_linear(x: Tensor, weight: Tensor, *, backend: Backend | None = None) -> Tensor:
    """silu(x gateᵀ) · (x upᵀ) [T, I] for weight [2 I, K], first gate, then up. Else as `thin_linear`."""
    if len(weight) % 2:
        raise ValueError(f"weight {shape_of(weight)} is not gate and up, of one shape: pass [2 I, K].")
    return _call("gated", x, weight, None, backend)


def _call(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend | None) -> Tensor:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x {x.dtype} {shape_of(x)} does not fit weight {weight.dtype} {shape_of(weight)}: pass [T, K] and [N, K] "
            "of one dtype."
        )
    if pick_backend(x, backend) == "torch":
        return _REFERENCE[kind](x, weight, bias)
    if x.element_size() != 2 or len(x) > MOST_ROWS or not weight.is_contiguous():
        raise ValueError(
            f"x {x.dtype} {shape_of(x)}, weight with strides {weight.stride()}: pass half precision, at most "
            f"{MOST_ROWS} rows and a contiguous weight, or use torch.nn.functional.linear."
        )
    x = x.contiguous()
    found: Tensor = _operator(kind, x, weight, bias, _way_for(kind, x, weight, bias))
    return found


_REFERENCE = {
    "plain": reference.thin_linear,
    "parts": lambda x, weight, _: reference.thin_linear_parts(x, weight),
    "gated": lambda x, weight, _: reference.thin_gated_linear(x, weight),
}


def _run(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, way: str) -> Tensor:
    if way != CUBLAS:
        return launch_thin(kind, x, weight, bias, ways(kind)[way])
    if kind == "parts":
        return _product(x, weight)[None]
    product = F.linear(x, weight, bias)
    return swiglu(*product.chunk(2, dim=-1), backend="triton") if kind == "gated" else product


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """By cuBLAS, [T, N] float32."""
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def _fake(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, way: str) -> Tensor:
    columns = len(weight)
    if kind == "parts":
        parts = 1 if way == CUBLAS else ways(kind)[way].parts
        return x.new_empty(parts, len(x), columns, dtype=torch.float32)
    return x.new_empty(len(x), columns // 2 if kind == "gated" else columns)


_operator = register_operator(
    "thin_linear(str kind, Tensor x, Tensor weight, Tensor? bias, str way) -> Tensor", _run, _fake
)


def _way_for(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The fastest way for such shapes, timed as a decode step runs them: many in turn, each weight from memory."""
    # A row and a descriptor's start must be aligned to 16 bytes.
    has_tma = all(size % 8 == 0 for size in (x.shape[1], x.storage_offset(), weight.storage_offset()))
    if not x.is_cuda:  # Triton's interpreter
        return next(iter(ways(kind, has_tma)))
    if isinstance(x, FakeTensor):
        return CUBLAS
    shape = (triton.next_power_of_2(len(x)), *weight.shape, bias is not None, has_tma)
    known = _chosen.get((kind, shape, x.dtype, x.device))
    if known is None:
        trial = _Trial(kind, x, weight, bias)
        names = (CUBLAS, *ways(kind, has_tma))
        candidates = {name: lambda name=name: trial.run(name) for name in names}
        known = pick(f"thin_linear {kind}", shape, x, candidates, default=CUBLAS, agrees=trial.agrees, in_graph=True)
        if not torch.cuda.is_current_stream_capturing():
            _chosen[kind, shape, x.dtype, x.device] = known
    return known


_chosen: dict[tuple[Kind, tuple[int, ...], torch.dtype, torch.device], str] = {}


class _Trial:
    """Random rows and copies of a weight that L2 cannot hold together, created at first use; and what is right."""

    def __init__(self, kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.kind, self.like, self.weight, self.bias = kind, x, weight, bias
        self.x: Tensor | None = None
        self.weights: list[Tensor] = []

    def run(self, way: str) -> Tensor:
        if self.x is None:
            own = torch.Generator(self.like.device).manual_seed(0)  # not the user's stream of random numbers
            self.x = torch.empty_like(self.like).normal_(generator=own)
            cache = torch.cuda.get_device_properties(self.like.device).L2_cache_size
            self.weights = [self.weight.clone() for _ in range(min(2 + 2 * cache // self.weight.nbytes, MOST_COPIES))]
        return [_run(self.kind, self.x, weight, self.bias, way) for weight in self.weights][-1]

    def agrees(self, found: Tensor) -> bool:
        assert self.x is not None
        exact = _product(self.x, self.weight)
        if self.kind == "gated":
            gate, up = exact.chunk(2, dim=-1)
            exact = F.silu(gate) * up
        if self.bias is not None:
            exact += self.bias
        found = found.sum(0) if self.kind == "parts" else found.float()
        return bool((found - exact).norm() <= 1e-2 * exact.norm())
