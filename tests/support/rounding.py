"""How far rounding may take a result: bounds from the data, whatever the machine, its libraries or the order of sums.

A test compares a result with its value in float64 and allows what these give, never the error that another
implementation happened to make on one machine.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONFIDENCE = 6.0
"""Standard deviations. So an entry lies beyond a bound with a chance of 2 exp(−6² / 2) = 3e-8."""


PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"})
"""What autocast computes in half precision."""


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def of_terms(count: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative to Σ |terms|: the error of their sum, each a product perhaps, in any order.

    λ √n u, the probabilistic bound of Higham and Mary (SIAM J. Sci. Comput. 41, 2019); n u always holds, but is far off
    where n is large.
    """
    return unit(dtype) * min(CONFIDENCE * math.sqrt(count), count) if count else 0.0


def of_product(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of left @ right summed in `dtype`, entry by entry, in float64."""
    return of_terms(left.shape[-1], dtype) * (left.double().abs() @ right.double().abs())


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float, name: str = "result") -> None:
    """Every entry of `found` is as near to `exact` as its entry of `bound`, or the one bound, says.

    Raises:
        AssertionError: naming the worst entry.
    """
    assert found.shape == exact.shape, f"{name}: shape {list(found.shape)}, not {list(exact.shape)}"
    if not exact.numel():
        return
    error = (found.double() - exact.double()).abs().nan_to_num(math.inf)
    error = error.masked_fill(found.double() == exact.double(), 0.0)  # infinities too
    bounds = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand_as(error)
    over = (error - bounds).flatten()
    worst = int(over.argmax())
    at, allowed = error.flatten()[worst].item(), bounds.flatten()[worst].item()
    assert over[worst] <= 0, f"{name}: error {at:.3g} at {worst} (of {over.numel()}), {allowed:.3g} allowed"


class RoundedAtRandom(TorchDispatchMode):
    """Within it, what goes into some operations and comes out of them is off by as much as rounding it to `dtype` might
    make it, at random.

    What computing a whole model in `dtype` may cost, on whatever machine: run it in float32 within this, and look how
    far it gets. A backward pass that is run within counts too.
    """

    def __init__(self, dtype: torch.dtype, operations: Collection[str], seed: int) -> None:
        super().__init__()
        self.unit, self.operations = unit(dtype), operations
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in self.operations:
            return func(*args, **(kwargs or {}))
        return self.rounded(func(*map(self.rounded, args), **(kwargs or {})))

    def rounded(self, value: Any) -> Any:
        """A tensor of floats with errors of up to one rounding each; all else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value * (1 + self.unit * (2 * torch.rand(value.shape, generator=self.generator) - 1))
