import math
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from fastgrpo_kernels import LossParams, grpo_loss
from torch import Tensor

from fastgrpo.settings.objective_settings import ObjectiveSettings
from fastgrpo.training.completion_records import CompletionRecord
from fastgrpo.training.metrics import rollout_metrics, update_metrics
from fastgrpo.types import ObjectiveTerms, SamplingMismatch, UpdateResult
from fastgrpo.update.sums import combine, sampling_mismatch

LENGTHS = [3, 1, 4, 2]

OF_ROLLOUTS = {
    *("completions/mean_length", "completions/min_length", "completions/max_length"),
    *("completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length"),
    *("completions/clipped_ratio", "reward", "reward_std", "frac_reward_zero_std"),
    *("rewards/accuracy/mean", "rewards/accuracy/std", "rewards/format/mean", "rewards/format/std"),
}
OF_UPDATES = {
    *("loss", "entropy", "kl"),
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
    *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
    *(f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")),
}
"""The names TRL 1.16 logs under; num_tokens and step_time are the trainer's."""


class Ranks:
    """An accelerator that gathers what it is told the other ranks sent."""

    def __init__(self, *others: Tensor) -> None:
        self.others = others
        self.sent: Tensor | None = None

    def gather(self, value: Tensor) -> Tensor:
        self.sent = value
        return torch.cat([value, *self.others])


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Four completions of a policy that moved, one of them masked out."""
    generator = torch.Generator().manual_seed(seed)
    old, move, ref, drawn = (torch.randn(sum(LENGTHS), generator=generator) for _ in range(4))
    mask = torch.tensor([True] * 8 + [False] * 2)
    return {
        "logprobs": -old.abs() + 0.5 * move,
        "old": -old.abs(),
        "ref": -ref.abs(),
        "drawn": -drawn.abs(),
        "entropy": ref.abs(),
        "mask": mask,
        "advantages": torch.tensor([1.0, 0.5, -1.0, -2.0]),
    }


TERMS = ObjectiveTerms(*torch.zeros(4).unbind())


def result_of(batch: dict[str, Tensor], lengths: list[int] = LENGTHS, chosen: slice = slice(None)) -> UpdateResult:
    """The update's result on the sequences `lengths`, whose tokens are `chosen`."""
    first = LENGTHS.index(lengths[0]) if lengths else 0
    mask, logprobs = batch["mask"][chosen], batch["logprobs"][chosen]
    output = grpo_loss(
        logprobs,
        batch["advantages"][first : first + len(lengths)],
        torch.full((len(logprobs),), 0.1),
        torch.tensor([0, *lengths]).cumsum(0),
        LossParams(beta=0.1),
        old_logprobs=batch["old"][chosen],
        ref_logprobs=batch["ref"][chosen],
        mask=mask,
        entropy=batch["entropy"][chosen],
    )
    return UpdateResult(output.loss, output.metrics, sampling_mismatch(logprobs, batch["drawn"][chosen], mask), TERMS)


def nothing() -> UpdateResult:
    none = torch.zeros(0)
    output = grpo_loss(none, none, none, torch.zeros(1, dtype=torch.int64), LossParams())
    return UpdateResult(output.loss, output.metrics, sampling_mismatch(none, none, none.bool()), TERMS)


def metrics_of(result: UpdateResult, beta: float = 0.1, ranks: Ranks | None = None) -> dict[str, float]:
    return update_metrics(result, ObjectiveSettings(beta=beta), cast(Accelerator, ranks or Ranks()))


def completion(accuracy: float | None = 1.0, format: float | None = 1.0, **changes: Any) -> CompletionRecord:
    fields = {
        "row_id": 0, "index": 0, "prompt": "", "completion": "", "finish_reason": "stop", "length": 5,
        "prompt_length": 3, "advantage": 0.0, "reward": 1.0, "rewards": {"accuracy": accuracy, "format": format},
    }  # fmt: skip
    return CompletionRecord(**fields | changes)


def test_sampling_mismatch_is_computed_over_counted_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, math.nan, -0.5], requires_grad=True)
    drawn = torch.tensor([-1.5, -1.0, -3.0, math.nan])
    mismatch = sampling_mismatch(logprobs, drawn, torch.tensor([True, True, False, False]))
    expected = (2, 1.5, 1.0, 2, math.exp(0.5) + math.exp(-1), math.exp(-1), math.exp(0.5))
    torch.testing.assert_close(torch.stack([value.float() for value in mismatch]), torch.tensor(expected))
    assert not any(value.requires_grad for value in mismatch)


def test_combine_adds_up_and_takes_extremes() -> None:
    parts = [
        SamplingMismatch(*torch.tensor(fields)) for fields in ([2.0, 1, 0.5, 2, 3, 0.5, 2], [3.0, 2, 0.1, 3, 4, 0.9, 5])
    ]
    assert torch.stack(combine(parts)).tolist() == [5.0, 3.0, 0.5, 5.0, 7.0, 0.5, 5.0]
    assert torch.stack(combine(parts[:1])).tolist() == torch.stack(parts[0]).tolist()


def test_combine_of_micro_batches_equals_the_whole_batch() -> None:
    batch = tokens()
    whole = result_of(batch)
    parts = [result_of(batch, LENGTHS[:2], slice(0, 4)), result_of(batch, LENGTHS[2:], slice(4, 10))]
    for field in ("metrics", "mismatch"):
        combined = combine([getattr(part, field) for part in parts])
        for name, value, expected in zip(combined._fields, combined, getattr(whole, field), strict=True):
            torch.testing.assert_close(value, expected.float(), msg=lambda text, name=name: f"{name}: {text}")


def test_update_metrics_against_their_definitions() -> None:
    batch = tokens()
    metrics = metrics_of(result_of(batch))
    counted = batch["mask"]
    advantage = batch["advantages"].repeat_interleave(torch.tensor(LENGTHS))[counted]
    owner = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[counted]
    logprobs, old, ref, drawn = (batch[name][counted] for name in ("logprobs", "old", "ref", "drawn"))
    ratio = (logprobs - old).exp()
    low, high = ((ratio < 0.8) & (advantage < 0)).float(), ((ratio > 1.2) & (advantage > 0)).float()
    shares = [[clipped[owner == i].mean().item() for i in range(3)] for clipped in (low, high)]
    expected = {
        "entropy": batch["entropy"][counted].mean(),
        "kl": ((ref - logprobs).exp() - (ref - logprobs) - 1).mean(),
        "clip_ratio/low_mean": low.mean(),
        "clip_ratio/low_min": min(shares[0]),
        "clip_ratio/high_mean": high.mean(),
        "clip_ratio/high_max": max(shares[1]),
        "clip_ratio/region_mean": (low + high).mean(),
        "sampling/sampling_logp_difference/mean": (logprobs - drawn).abs().mean(),
        "sampling/sampling_logp_difference/max": (logprobs - drawn).abs().max(),
        "sampling/importance_sampling_ratio/min": (logprobs - drawn).exp().min(),
        "sampling/importance_sampling_ratio/mean": (logprobs - drawn).exp().mean(),
        "sampling/importance_sampling_ratio/max": (logprobs - drawn).exp().max(),
    }
    assert low.sum() > 0, "the example must clip on both sides"
    assert high.sum() > 0
    assert {name: metrics[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})


def test_ranks_weigh_by_their_tokens() -> None:
    """Two ranks with halves of the batch report what one rank reports of the whole."""
    batch = tokens()
    other = Ranks()
    metrics_of(result_of(batch, LENGTHS[2:], slice(4, 10)), ranks=other)
    assert other.sent is not None
    both = metrics_of(result_of(batch, LENGTHS[:2], slice(0, 4)), ranks=Ranks(other.sent))
    assert both == pytest.approx(metrics_of(result_of(batch)), rel=1e-5)


def test_a_rank_without_completions_changes_nothing() -> None:
    empty = Ranks()
    metrics_of(nothing(), ranks=empty)
    assert empty.sent is not None
    result = result_of(tokens())
    assert metrics_of(result, ranks=Ranks(empty.sent)) == pytest.approx(metrics_of(result))


def test_nothing_at_all_gives_finite_figures_only() -> None:
    metrics = metrics_of(nothing())
    assert metrics["loss"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert "clip_ratio/low_min" not in metrics
    assert rollout_metrics([]) == {}


def test_names_are_those_of_trl() -> None:
    assert set(metrics_of(result_of(tokens()))) == OF_UPDATES
    assert set(metrics_of(result_of(tokens()), beta=0.0)) == OF_UPDATES - {"kl"}
    assert set(rollout_metrics([completion(), completion()])) == OF_ROLLOUTS | {
        "reflection_rate",
        "reflections_per_1k_tokens",
    }


def test_rollout_metrics_against_their_definitions() -> None:
    records = [
        completion(length=2, accuracy=1.0, format=0.0, reward=1.0, reflections=2),
        completion(length=6, finish_reason="length", accuracy=0.0, format=None, reward=0.0),
        completion(length=4, accuracy=None, format=1.0, reward=1.0, zero_std=True),
        completion(length=9, finish_reason="abort", accuracy=None, format=None, reward=None, zero_std=True),
    ]
    metrics = rollout_metrics(records)
    assert metrics == pytest.approx(
        {
            "completions/mean_length": 21 / 4,
            "completions/min_length": 2,
            "completions/max_length": 9,
            "completions/mean_terminated_length": 3,
            "completions/min_terminated_length": 2,
            "completions/max_terminated_length": 4,
            "completions/clipped_ratio": 0.5,
            "reward": 2 / 3,
            "reward_std": math.sqrt(1 / 3),
            "frac_reward_zero_std": 0.5,
            "reflection_rate": 0.25,
            "reflections_per_1k_tokens": 2000 / 21,
            "rewards/accuracy/mean": 0.5,
            "rewards/accuracy/std": math.sqrt(0.5),
            "rewards/format/mean": 0.5,
            "rewards/format/std": math.sqrt(0.5),
        }
    )


def test_no_completion_terminated() -> None:
    metrics = rollout_metrics([completion(finish_reason="length")] * 2)
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0


def test_a_reward_that_always_abstains_has_no_mean() -> None:
    metrics = rollout_metrics([completion(accuracy=None, reward=None)] * 2)
    assert "rewards/accuracy/mean" not in metrics
    assert "reward" not in metrics
