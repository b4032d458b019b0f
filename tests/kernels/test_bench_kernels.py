"""The benchmark's gate: exact results are exact, and a side that is wrong is not timed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_kernels import Measured, check_sides, ratios_of
from head_sides import HeadInputs, HeadResult, HeadSide, exact_head, head_errors, plain_logprob
from kernel_ops import Op, head_op, loss_op, sides_of
from loss_sides import LossSide, our_loss, plain_loss

TORCH = HeadSide("torch", plain_logprob)


@pytest.fixture
def head() -> Op:
    return head_op(64, 32, 1000, torch.float32, "cpu")


class WrongWeightGradient(HeadSide):
    def forward_backward(self, inputs: HeadInputs) -> HeadResult:
        result = super().forward_backward(inputs)
        return replace(result, grad_weight=result.grad_weight * 1.001)


def failing(inputs: HeadInputs) -> torch.Tensor:
    raise RuntimeError("out of luck")


def test_exact_head_equals_autograd_in_float64(head: Op):
    inputs = head.make_inputs()
    doubled = replace(inputs, hidden=inputs.hidden.double(), weight=inputs.weight.double())
    double = HeadSide("double", lambda x: (x.hidden @ x.weight.T).log_softmax(-1).gather(1, x.targets[:, None])[:, 0])
    # The upstream gradient is float32's.
    assert max(head_errors(double.forward_backward(doubled), exact_head(inputs)).values()) < 1e-7


def test_wrong_and_failing_sides_are_not_timed(head: Op):
    ours = next(side for side in sides_of("head", "cpu")[0] if side.name == "fastgrpo")
    sides: list[Any] = [
        ours,
        WrongWeightGradient("fastgrpo_recompute", plain_logprob),
        HeadSide("peer", failing),
        TORCH,
    ]
    rows, torch_errors = check_sides(head, sides, head.make_inputs(), {})
    assert list(rows) == [side.name for side in sides]
    assert {name: bool(row.fault) for name, row in rows.items()} == {
        "fastgrpo": False,
        "fastgrpo_recompute": True,
        "peer": True,
        "torch": False,
    }
    assert "grad_weight" in rows["fastgrpo_recompute"].fault
    assert "out of luck" in rows["peer"].fault
    assert torch_errors == rows["torch"].errors


def test_nan_is_a_fault(head: Op):
    assert head.fault("fastgrpo", {"grad_hidden": float("nan")}, {"grad_hidden": 1.0})


def test_loss_sides_agree():
    op = loss_op(512, "cpu")
    rows, _ = check_sides(op, [LossSide("fastgrpo", our_loss), LossSide("torch", plain_loss)], op.make_inputs(), {})
    assert not any(row.fault for row in rows.values())
    assert rows["fastgrpo"].errors.keys() >= {"grad_logprobs", "loss", "kl", "clip_low", "clip_high"}


def test_ratios_are_theirs_over_ours(head: Op):
    rows = {
        "fastgrpo": Measured("fastgrpo", seconds=[1.0, 2.0], peak=10),
        "fastgrpo_recompute": Measured("fastgrpo_recompute", seconds=[4.0, 4.0], peak=5),
        "torch": Measured("torch", seconds=[2.0, 4.0], peak=80),
        "cce": Measured("cce", fault="wrong"),
    }
    assert ratios_of(head, rows) == {
        "time_vs_torch": 2.0,
        "memory_vs_torch": 8.0,
        "recompute_time_vs_torch": 0.75,
        "recompute_memory_vs_torch": 16.0,
    }
