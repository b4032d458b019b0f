"""Who is let through to be timed, and who is not."""

import pytest
import torch

from fastgrpo.cli.arguments import parse
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OURS, PAPER, PLAIN
from fastgrpo.profile.sides.start import build_trainer
from fastgrpo.update import packed_passes


@pytest.fixture
def build(tiny_model_dir, sat_file, tmp_path):
    """Builds a side's trainer on the tiny model."""

    def build_side(side: str, **changes: object):
        flags = {
            "model_name_or_path": tiny_model_dir,
            "dataset_name": sat_file,
            "output_dir": tmp_path / side,
            "batch_unit": "prompts",
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 6,
            "max_steps": 2,
            "report_to": "none",
            "use_cpu": "true",
            **changes,
        }
        return build_trainer(
            side, *parse([token for name, value in flags.items() for token in (f"--{name}", str(value))])
        )

    return build_side


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("side", [PLAIN, PAPER])
def test_sides_that_do_the_same_pass(build, side, beta):
    found = gate.compare(gate.answer_of(build(OURS, beta=beta)), build(side, beta=beta), gate.FP32)
    assert found.failures == []
    found.require()
    assert set(found.limits) == set(found.figures)
    assert len(found.figures) == 4


def test_a_flipped_sign_is_refused_a_timing(build, monkeypatch):
    right = packed_passes.packed_logprobs

    def flipped(*arguments, **settings):
        output = right(*arguments, **settings)
        return output._replace(logprobs=-output.logprobs)

    monkeypatch.setattr(packed_passes, "packed_logprobs", flipped)
    ours, theirs = build(OURS), build(PLAIN)
    found = gate.compare(gate.answer_of(ours), theirs, gate.FP32)
    assert any(line.startswith("gradient of") for line in found.failures)
    assert any(line.startswith("sampler against update") for line in found.failures)
    with pytest.raises(gate.GateError, match="refused a timing"):
        found.require()


def test_another_order_of_prompts_is_refused(build):
    found = gate.compare(gate.answer_of(build(OURS)), build(PLAIN, seed=7), gate.FP32)
    assert found.failures[0].startswith("prompts that differ 2")


def test_a_gradient_that_one_side_lacks_counts_as_zero():
    ours = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-9])}
    theirs = {"a": torch.tensor([3.0, 4.0]), "c": torch.tensor([2.0])}
    errors = gate.gradient_errors(ours, theirs)
    assert errors["a"] == 0
    assert errors["b"] == pytest.approx(1e-9 / (gate.NEGLIGIBLE * 29**0.5))
    assert errors["c"] == 1


def test_not_a_number_never_passes():
    found = gate.Gate()
    found.add("loss", float("nan"), 1.0)
    assert found.failures
    found = gate.Gate()
    nan = {"a": torch.tensor([float("nan")]), "b": torch.zeros(1)}
    gate.compare_update(found, (0.0, nan), (0.0, {"a": torch.ones(1), "b": torch.zeros(1)}), gate.FP32)
    assert found.failures


def test_tolerances_follow_the_number_format(build):
    config = build(OURS).config
    assert gate.tolerances(config, "float32") == gate.FP32
    assert gate.tolerances(config, "bfloat16") == gate.HALF
