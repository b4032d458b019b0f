"""The benchmark's gate: exact results are exact, and a side that is wrong is not timed."""

import pytest
import torch
from bench_kernels import Measured, check_sides, ratios_of
from sides import Op, Results, Side, relative_errors
from sides.head import HeadInputs, exact_head, head_op, plain_logprob, side
from sides.loss import loss_op


@pytest.fixture
def head() -> Op:
    return head_op(64, 32, 1000, torch.float32, "cpu")


def failing(inputs: HeadInputs) -> torch.Tensor:
    raise RuntimeError("out of luck")


def wrong_weight_gradient(inputs: HeadInputs) -> Results:
    found = side("torch", plain_logprob).run(inputs)
    return found | {"grad_weight": found["grad_weight"] * 1.001}


def test_exact_head_equals_autograd_in_float64(head: Op):
    inputs = head.make_inputs()
    doubled = inputs._replace(hidden=inputs.hidden.double(), weight=inputs.weight.double())
    double = side("double", lambda x: (x.hidden @ x.weight.T).log_softmax(-1).gather(1, x.targets[:, None])[:, 0])
    # The upstream gradient is float32's.
    assert max(relative_errors(double.run(doubled), exact_head(inputs)).values()) < 1e-7


def test_wrong_and_failing_sides_are_not_timed(head: Op):
    sides = [
        next(side for side in head.sides() if side.name == "fastgrpo"),
        Side("fastgrpo_recompute", wrong_weight_gradient),
        side("peer", failing),
        side("torch", plain_logprob),
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
    one = torch.ones(3)
    assert head.fault("fastgrpo", relative_errors({"x": one * torch.nan}, {"x": one}), {})
    assert not head.fault("fastgrpo", relative_errors({"x": one * torch.nan}, {"x": one * torch.nan}), {})


def test_single_numbers_are_compared_with_1_at_least():
    found = {"kl": torch.tensor(1e-3), "grad": torch.ones(1)}
    errors = relative_errors(found, {"kl": torch.tensor(0.0), "grad": torch.full((1,), 2.0)})
    assert errors["kl"] == pytest.approx(1e-3)
    assert errors["grad"] == pytest.approx(0.5)


def test_loss_sides_agree():
    op = loss_op(512, "cpu")
    rows, _ = check_sides(op, [side for side in op.sides() if side.name != "compile"], op.make_inputs(), {})
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
