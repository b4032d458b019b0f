"""The suite's stages at their smallest: right ones pass and are timed, a wrong op is refused a timing."""

from collections.abc import Callable
from typing import Any

import attention_sides
import head_sides
import loss_sides
import pytest
import rope_sides
import sample_sides
from harness import Result
from stages import STAGES

import fastgrpo.model.decoder
import fastgrpo.policy
import fastgrpo.weight_sync

QUICK = ("environment", "ceilings", "kernels", "head", "decode_ops", "rollout", "update", "sync", "memory")


def last_of(name: str) -> Result:
    """What a stage has found at its end."""
    stage = next(stage for stage in STAGES if stage.name == name)
    *_, result = stage.load()("smoke", "cpu")
    return result


@pytest.mark.parametrize("name", QUICK)
def test_a_stage_passes_and_has_figures(name: str) -> None:
    result = last_of(name)
    assert result.checks
    assert result.passed, result.checks
    assert result.figures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "step_plain"])
def test_the_step_passes(name: str) -> None:
    result = last_of(name)
    assert result.passed, result.checks
    assert result.figures["tokens" if name == "step" else "ours"]


def flipped(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, field: str | None = None) -> None:
    """The op's result, or one field of it, with the wrong sign."""
    right: Callable[..., Any] = getattr(module, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        output = right(*args, **kwargs)
        return -output if field is None else output._replace(**{field: -getattr(output, field)})

    monkeypatch.setattr(module, name, wrong)


@pytest.mark.parametrize(
    ("stage", "op", "broken"),
    [
        ("head", "head", (head_sides, "linear_logprob", "logprobs")),
        ("head", "loss", (loss_sides, "grpo_loss", "loss")),
        ("decode_ops", "attention", (attention_sides, "paged_attention")),
        ("decode_ops", "rope", (rope_sides, "rope_and_cache")),
        ("decode_ops", "sample", (sample_sides, "sample", "sampling_logprobs")),
    ],
)
def test_a_wrong_op_is_not_timed(stage: str, op: str, broken: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    flipped(monkeypatch, *broken)
    result = last_of(stage)
    assert not result.passed
    for sides in result.figures[op].values():
        assert sides["fastgrpo"]["fault"]
        assert "ms" not in sides["fastgrpo"]
        assert sides["torch"]["ms"] > 0
    assert [name for name, value in result.checks.items() if value is False and not name.startswith(op)] == []


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        ("kernels", (attention_sides, "paged_attention")),
        ("rollout", (fastgrpo.model.decoder, "paged_attention")),
        ("update", (fastgrpo.policy, "grpo_loss", "loss")),
        ("step", (fastgrpo.policy, "grpo_loss", "loss")),
    ],
)
def test_what_stands_on_a_wrong_op_is_not_timed(
    stage: str, broken: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    flipped(monkeypatch, *broken)
    result = last_of(stage)
    assert not result.passed
    assert result.ratios == {}
    assert "step_seconds" not in result.figures


def test_a_sync_that_forgets_a_weight_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastgrpo.weight_sync._copy_packed

    def forgets_the_last(modules: Any, weight: Any, bias: Any = None) -> None:
        right(list(modules)[:-1], weight, bias)

    monkeypatch.setattr(fastgrpo.weight_sync, "_copy_packed", forgets_the_last)
    result = last_of("sync")
    assert result.checks == {"weights are the policy's": False}
    assert result.figures == {}
