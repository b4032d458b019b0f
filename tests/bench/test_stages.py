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
from kernel_ops import decode_ops
from stages import STAGES, kernels, rollout

import fastgrpo.sampler.decoder
import fastgrpo.sampler.weight_sync
import fastgrpo.update.updater

DECODE_OPS = ("attention", "rope", "sample")
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
        ("rollout", (fastgrpo.sampler.decoder, "decode_attention")),
        ("update", (fastgrpo.update.updater, "grpo_loss", "loss")),
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


@pytest.mark.slow
def test_a_step_with_a_wrong_loss_is_timed_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    flipped(monkeypatch, fastgrpo.update.updater, "grpo_loss", "loss")
    result = last_of("step")
    assert result.figures["step_seconds"]
    assert result.checks["plain torch's step"] is False


def test_a_sync_that_forgets_a_weight_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastgrpo.sampler.weight_sync._copy_packed

    def forgets_the_last(modules: Any, *targets: Any) -> None:
        right(list(modules)[:-1], *targets)

    monkeypatch.setattr(fastgrpo.sampler.weight_sync, "_copy_packed", forgets_the_last)
    result = last_of("sync")
    assert result.checks == {"weights are the policy's": False}
    assert result.figures == {}


def test_what_a_gpu_will_run_can_be_listed_without_one() -> None:
    attention, rope, sample = ({op.shape for op in decode_ops("cuda", "full") if op.name == n} for n in DECODE_OPS)
    assert "B=256 G=8 prefix=700 own=324 12/2x128 bfloat16" in attention
    assert rope
    assert "B=256 V=151936 filtered" in sample
    assert {op.name for op in kernels.shapes_of("full", "cuda")} == {"head", "loss", *DECODE_OPS}
    assert list(rollout.workloads_of("full")) == ["B=8", "B=64", "B=256", "B=512"]
    assert rollout.WITHOUT_GRAPHS in rollout.workloads_of("full")
    for workload in rollout.workloads_of("full").values():
        prompt = workload.text_tokens[0] + (workload.patches // 2) ** 2
        assert (workload.group, prompt, workload.new_tokens) == (8, 700, 324)


def test_our_own_step_fits_into_eight_minutes() -> None:
    names = [stage.name for stage in STAGES]
    before = STAGES[: names.index("step") + 1]
    assert sum(stage.full_seconds for stage in before) <= 8 * 60
