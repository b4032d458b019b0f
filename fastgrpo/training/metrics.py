"""A step's figures under TRL's metric names, from device sums and from the completions of all ranks."""

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LossMetrics

from fastgrpo.settings.objective_settings import ObjectiveSettings
from fastgrpo.training.completion_records import CompletionRecord
from fastgrpo.types import ObjectiveTerms, SamplingMismatch, UpdateResult
from fastgrpo.update.sums import combine


def update_metrics(result: UpdateResult, config: ObjectiveSettings, accelerator: Accelerator) -> dict[str, float]:
    """The metrics of an update over all ranks; of one that trained on nothing, the loss alone."""
    local = torch.stack([value.float() for value in (result.loss, *result.metrics, *result.mismatch, *result.terms)])
    ranks = accelerator.gather(local[None]).cpu()  # [ranks, fields]
    loss = ranks[:, 0].sum().item()
    parts = [
        row[1:].split([len(kind._fields) for kind in (LossMetrics, SamplingMismatch, ObjectiveTerms)]) for row in ranks
    ]
    sums = combine([LossMetrics(*part[0]) for part in parts])
    mismatch = combine([SamplingMismatch(*part[1]) for part in parts])
    terms = combine([ObjectiveTerms(*part[2]) for part in parts])
    if sums.token_count == 0:
        return {"loss": loss}
    tokens = sums.token_count.item()
    clipped = max(sums.clip_count.item(), 1.0)
    metrics = {
        "loss": loss,
        "entropy": sums.entropy_sum.item() / tokens,
        "clip_ratio/low_mean": sums.clip_low_sum.item() / clipped,
        "clip_ratio/low_min": sums.clip_low_seq_min.item(),
        "clip_ratio/high_mean": sums.clip_high_sum.item() / clipped,
        "clip_ratio/high_max": sums.clip_high_seq_max.item(),
        "clip_ratio/region_mean": sums.clip_region_sum.item() / clipped,
        "sampling/sampling_logp_difference/mean": mismatch.difference_sum.item() / tokens,
        "sampling/sampling_logp_difference/max": mismatch.difference_max.item(),
        "sampling/importance_sampling_ratio/min": mismatch.ratio_min.item(),
        "sampling/importance_sampling_ratio/mean": mismatch.ratio_sum.item() / max(mismatch.ratio_count.item(), 1.0),
        "sampling/importance_sampling_ratio/max": mismatch.ratio_max.item(),
    }
    if config.beta > 0:
        metrics["kl"] = sums.kl_sum.item() / tokens
    if config.loss_type == "cispo":  # TRL's name of it there
        metrics["cispo_clip_ratio"] = metrics["clip_ratio/high_mean"]
    if config.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = terms.vespo_sum.item() / terms.sequence_count.item()
    if terms.router_sum:
        metrics["aux_loss"] = terms.router_sum.item()
    # A loss that is not finite is told, not hidden.
    return {name: value for name, value in metrics.items() if name == "loss" or math.isfinite(value)}


def rollout_metrics(records: Sequence[CompletionRecord]) -> dict[str, float]:
    """The metrics of a rollout from the records of all ranks."""
    if not records:
        return {}
    lengths = [record.length for record in records]
    terminated = [record.length for record in records if record.finish_reason == "stop"]
    rewards = torch.tensor([math.nan if record.reward is None else record.reward for record in records])
    metrics = {
        **_spread("completions/{}_length", lengths),
        # TRL's value when nothing terminated.
        **_spread("completions/{}_terminated_length", terminated or [0]),
        "completions/clipped_ratio": 1 - len(terminated) / len(records),
        "reward": rewards.nanmean().item(),
        "reward_std": _nan_std(rewards.tolist()),
        "frac_reward_zero_std": _mean(record.zero_std for record in records),
        "reflection_rate": _mean(record.reflections > 0 for record in records),
        "reflections_per_1k_tokens": 1000 * sum(record.reflections for record in records) / max(sum(lengths), 1),
    }
    corrections = [record.correction for record in records if record.has_options]
    for kind in ("wrong to right", "right to wrong") if corrections else ():
        metrics[f"self_correction/{kind.replace(' ', '_')}"] = corrections.count(kind) / len(corrections)
    calls = [record.tool_calls for record in records if record.tool_calls is not None]
    if calls:
        total, failed = (sum(counts) for counts in zip(*calls, strict=True))
        metrics |= {"tools/call_frequency": total / len(calls), "tools/failure_frequency": failed / max(total, 1)}
    for name in records[0].rewards:
        values = [reward for record in records if (reward := record.rewards[name]) is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = _nan_std(values)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    statistics = {"mean": _mean(values), "min": float(min(values)), "max": float(max(values))}
    return {name.format(statistic): value for statistic, value in statistics.items()}


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _nan_std(values: Iterable[float]) -> float:
    """Bessel's standard deviation of the values that are not NaN; 0 for fewer than two."""
    numbers = [value for value in values if not math.isnan(value)]
    mean = _mean(numbers)
    return math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) if len(numbers) > 1 else 0.0
