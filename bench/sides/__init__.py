"""What the kernels' benchmarks compare: an op at a shape, its implementations, and what float64 makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Results = dict[str, Tensor]
"""By name: outputs, and gradients where there are any."""
OURS = ("fastgrpo", "fastgrpo_recompute")
ERROR_OVER_TORCH, ERROR_OVER_TORCH_PEERS = 1.1, 10.0
"""How many times plain torch's own error, in the same dtype, a side of ours or a peer's may make."""


@dataclass(frozen=True)
class Side:
    """One implementation. It may raise ImportError where its package is missing, NotImplementedError on a CPU."""

    name: str
    run: Callable[[Any], Results]
    """All of it, gradients included."""
    forward: Callable[[Any], Any] | None = None
    """The pass without gradients, where that is of interest too."""


class Work(NamedTuple):
    """The least an op must do, and what it is counted in."""

    amount: float
    floor: str
    """gemm: FLOPs; copy: bytes."""


def relative_errors(found: Results, exact: Results) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖, a single number's relative to 1 at least; infinite where only one of them is NaN.

    `logprobs` are compared by their greatest difference, in nats.
    """
    errors = {}
    for name, got in found.items():
        got, true = got.double(), exact[name].double()
        if not torch.equal(got.isnan(), true.isnan()):
            errors[name] = torch.inf
            continue
        difference, true = (got - true).nan_to_num(), true.nan_to_num()
        if name == "logprobs":
            errors[name] = float(difference.abs().max())
        else:
            scale = torch.linalg.vector_norm(true).clamp(min=0.0 if got.dim() else 1.0)
            errors[name] = float(torch.linalg.vector_norm(difference) / scale.clamp(min=1e-300))
    return errors


@dataclass(frozen=True)
class Op:
    """One op at one shape."""

    name: str
    shape: str
    make_inputs: Callable[[], Any]
    """The same ones each time, at new addresses."""
    sides: Callable[[], Sequence[Side]]
    """Ours first, then plain torch, then peers."""
    exact: Callable[[Any], Any]
    """Results in float64."""
    tolerance: float
    """Error that any implementation in this dtype may make."""
    work: Work
    errors: Callable[[Any, Any], dict[str, float]] = relative_errors
    """Of results against exact ones."""
    is_small: bool = True
    """A few kernels that take less than their launches do."""

    def fault(self, name: str, errors: dict[str, float], torch_errors: dict[str, float]) -> str:
        """What is wrong with side `name`, if anything."""
        factor = ERROR_OVER_TORCH if name in OURS else ERROR_OVER_TORCH_PEERS
        for key, error in errors.items():
            allowed = factor * torch_errors.get(key, 0.0) + self.tolerance
            if not error <= allowed:  # NaN is wrong too
                return f"error of {key} is {error:.2g}, {allowed:.2g} allowed"
        return ""


def dtype_name(dtype: torch.dtype) -> str:
    """float32"""
    return str(dtype).removeprefix("torch.")


def tolerance_of(dtype: torch.dtype) -> float:
    """Rounding of the result alone."""
    return 1e-5 if dtype == torch.float32 else 1e-3
