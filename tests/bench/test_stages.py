"""The suite's stages at their smallest: right ones pass and are timed, a wrong op is refused a timing."""

from collections.abc import Callable
from typing import Any

import pytest
import sides.attention
import sides.head
import sides.loss
import sides.rope
import sides.sample
import torch
from harness import Result
from sides.ops import decode_ops, odd_ops
from stages import STAGES, Task, rollout

import fastgrpo.sampler.engine
import fastgrpo.sampler.packed_decoder
import fastgrpo.update.updater

DECODE_OPS = ("decode_attention", "attention", "rope", "sample")
QUICK = ("environment", "kernels", "head", "decode_ops", "rollout", "update", "sync", "memory")


def last_of(name: str) -> Result:
    """What a stage has found at its end."""
    stage = next(stage for stage in STAGES if stage.name == name)
    *_, result = stage.load()(Task("smoke", "cpu"))
    return result


@pytest.mark.parametrize("name", QUICK)
def test_a_stage_passes_and_has_figures(name: str) -> None:
    result = last_of(name)
    assert result.checks
    assert result.passed, result.checks
    assert result.figures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "step_kernels", "step_plain"])
def test_the_step_passes(name: str) -> None:
    result = last_of(name)
    assert result.passed, result.checks
    assert result.figures[{"step": "tokens", "step_kernels": "update", "step_plain": "ours"}[name]]


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
        ("head", "head", (sides.head, "linear_logprob", "logprobs")),
        ("head", "loss", (sides.loss, "grpo_loss", "loss")),
        ("decode_ops", "attention", (sides.attention, "paged_attention")),
        ("decode_ops", "decode_attention", (sides.attention, "decode_attention")),
        ("decode_ops", "rope", (sides.rope, "rope_and_cache")),
        ("decode_ops", "sample", (sides.sample, "sample", "sampling_logprobs")),
    ],
)
def test_a_wrong_op_is_not_timed(stage: str, op: str, broken: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    flipped(monkeypatch, *broken)
    result = last_of(stage)
    assert not result.passed
    for measured in result.figures[op].values():
        assert measured["fastgrpo"]["fault"]
        assert "ms" not in measured["fastgrpo"]
        assert measured["torch"]["ms"] > 0
    assert [name for name, value in result.checks.items() if value is False and not name.startswith(f"{op} ")] == []


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        ("kernels", (sides.attention, "paged_attention")),
        ("rollout", (fastgrpo.sampler.packed_decoder, "decode_attention")),
        ("update", (fastgrpo.update.updater, "micro_loss", "loss")),
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
    flipped(monkeypatch, fastgrpo.update.updater, "micro_loss", "loss")
    result = last_of("step")
    assert result.figures["step_seconds"]
    assert result.checks["plain torch's step"] is False


def test_a_sync_that_forgets_a_weight_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastgrpo.sampler.choice.sync_weights

    def forgets_one(decoder: Any, model: Any) -> None:
        right(decoder, model)
        decoder.layers[-1].out.zero_()

    monkeypatch.setattr(fastgrpo.sampler.choice, "sync_weights", forgets_one)
    result = last_of("sync")
    assert result.checks == {"weights are the policy's": False}
    assert result.figures == {}


def test_what_a_gpu_will_run_can_be_listed_without_one() -> None:
    shapes = {name: {op.shape for op in decode_ops("cuda", "full") if op.name == name} for name in DECODE_OPS}
    assert "B=64 G=8 prefix=700 own=324 12/2x128 bfloat16" in shapes["decode_attention"]
    assert shapes["attention"]
    assert shapes["rope"]
    assert "B=64 V=151936 top_k" in shapes["sample"]
    assert {op.name for op in odd_ops("cuda", "full", torch.bfloat16)} == {"head", "loss", *DECODE_OPS}
    workloads = rollout.workloads_of(Task("full", "cuda", rows=(8, 64)))
    assert list(workloads) == ["B=8", "B=64"]
    for workload in workloads.values():
        assert (workload.group, workload.prompt_tokens, workload.new_tokens) == (8, 700, 324)


def test_all_but_the_comparisons_fit_into_ten_minutes() -> None:
    ours = [stage for stage in STAGES if not stage.module.startswith("compare")]
    assert list(STAGES[: len(ours)]) == ours
    assert sum(stage.h100 for stage in ours[: [stage.name for stage in ours].index("rollout") + 1]) <= 8 * 60
    assert sum(stage.h100 for stage in ours) <= 10 * 60
