"""What `bench_kernels.py` and `test_ops.py` measure: each op's inputs, sides, exact results and work, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from head_sides import exact_head, head_errors, head_sides, make_head_inputs
from loss_sides import exact_loss, loss_errors, loss_sides, make_loss_inputs

OURS = ("fastgrpo", "fastgrpo_recompute")
ERROR_OVER_TORCH, ERROR_OVER_TORCH_PEERS = 1.1, 10.0
"""How many times plain torch's own error, in the same dtype, a side of ours or a peer's may make."""
VOCABULARY = 151_936


class Side(Protocol):
    """One implementation of an op."""

    @property
    def name(self) -> str: ...
    @property
    def forward_only(self) -> bool:
        """Whether its forward pass alone is of interest."""
        ...

    def forward(self, inputs: Any) -> Any: ...
    def forward_backward(self, inputs: Any) -> Any: ...


class Work(NamedTuple):
    """The least an op must do, and what it is counted in."""

    amount: float
    floor: str
    """gemm: FLOPs; copy: bytes."""


@dataclass(frozen=True)
class Op:
    """One op at one shape."""

    name: str
    shape: str
    make_inputs: Callable[[], Any]
    exact: Callable[[Any], Any]
    """Results in float64."""
    errors: Callable[[Any, Any], dict[str, float]]
    """Of results against exact ones."""
    tolerance: float
    """Error that any implementation in this dtype may make."""
    work: Work

    def fault(self, name: str, errors: dict[str, float], torch_errors: dict[str, float]) -> str:
        """What is wrong with side `name`, if anything."""
        factor = ERROR_OVER_TORCH if name in OURS else ERROR_OVER_TORCH_PEERS
        for key, error in errors.items():
            allowed = factor * torch_errors.get(key, 0.0) + self.tolerance
            if not error <= allowed:  # NaN is wrong too
                return f"error of {key} is {error:.2g}, {allowed:.2g} allowed"
        return ""


def sides_of(op_name: str, device: str) -> tuple[list[Any], dict[str, str]]:
    """The op's sides, ours first, then plain torch; and which peers were left out, and why."""
    return head_sides(device) if op_name == "head" else (loss_sides(), {})


def head_op(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str) -> Op:
    """`linear_logprob`, both passes, the gradient of the weight included."""
    return Op(
        name="head",
        shape=head_shape(tokens, hidden_size, vocabulary, dtype),
        make_inputs=lambda: make_head_inputs(tokens, hidden_size, vocabulary, dtype, device),
        exact=exact_head,
        errors=head_errors,
        tolerance=1e-5 if dtype == torch.float32 else 1e-3,
        # What is computed twice counts once: logits, dX and dW.
        work=Work(6.0 * tokens * hidden_size * vocabulary, "gemm"),
    )


def head_shape(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> str:
    """The shape's name in tables and records."""
    return f"T={tokens} H={hidden_size} V={vocabulary} {str(dtype).removeprefix('torch.')}"


def loss_op(tokens: int, device: str) -> Op:
    """`grpo_loss` in float32 with KL and metrics, both passes."""
    return Op(
        name="loss",
        shape=f"T={tokens} float32",
        make_inputs=lambda: make_loss_inputs(tokens, device),
        exact=exact_loss,
        errors=loss_errors,
        tolerance=1e-5,
        # Four inputs read and the gradient written, each once.
        work=Work(5.0 * 4 * tokens, "copy"),
    )


def ops_of(device: str, scale: str) -> list[Op]:
    """What a run measures; of each op the shape that its ratios are taken at comes first."""
    if scale == "tiny":
        return [head_op(64, 32, 1000, torch.float32, device), loss_op(512, device)]
    if device == "cpu":
        return [head_op(2048, 256, VOCABULARY, torch.float32, device), loss_op(1 << 16, device)]
    heads = [
        head_op(1024 * thousands, hidden_size, VOCABULARY, torch.bfloat16, device)
        for hidden_size in (1536, 2048, 3584)
        for thousands in (16, 32, 4, 64)
    ]
    return heads + [loss_op(tokens, device) for tokens in (1 << 16, 1 << 18, 1 << 20)]
