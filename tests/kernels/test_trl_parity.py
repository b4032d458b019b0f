"""Loss, gradients and metrics against those that TRL gave (`bench/record_trl_losses.py` recorded them)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastgrpo_kernels import LossMetrics, VespoParams, grpo_loss, vespo_weights
from fastgrpo_kernels.backend import Backend
from safetensors import safe_open
from torch import Tensor

from fastgrpo.config import LOSS_TYPES
from fastgrpo.update.objective import loss_params, sequence_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with safe_open(Path(__file__).parent / "data" / "trl_losses.safetensors", framework="pt", device=DEVICE) as file:
    RECORDING = json.loads(file.metadata()["recording"])
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable itself
CASES = RECORDING["cases"]
MASK = TENSORS["mask"].bool()  # [B, L]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def label(index: int) -> str:
    options = CASES[index]["options"]
    return f"{index}-{options['loss_type']}-{options['importance_sampling_level']}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("index", range(len(CASES)), ids=label)
def test_trl_gives_the_same(index: int, backend: Backend) -> None:
    options, expected = CASES[index]["options"], CASES[index]["metrics"]
    logprobs, entropy = (poisoned(TENSORS[name]).requires_grad_() for name in ("logprobs", "entropy"))
    of_sequences = vespo(options) if options["loss_type"] == "vespo" else torch.ones(len(MASK), device=DEVICE)
    output = grpo_loss(
        logprobs,
        TENSORS["advantages"],
        token_weights(options),
        torch.arange(len(MASK) + 1, device=DEVICE) * MASK.shape[1],
        loss_params(SimpleNamespace(**options)),
        old_logprobs=poisoned(TENSORS["old_logprobs"]) if options["has_old_logprobs"] else None,
        ref_logprobs=poisoned(TENSORS["ref_logprobs"]) if options["beta"] else None,
        mask=MASK.flatten(),
        policy_scale=poisoned(TENSORS["policy_scale"][index] * of_sequences[:, None]),
        entropy=entropy,
        entropy_weights=entropy_weights(options, TENSORS["bonus_mask"][index]),
        backend=backend,
    )
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), TENSORS["loss"][index], **TOLERANCE)
    for name, tensor in (("logprobs_grad", logprobs), ("entropy_grad", entropy)):
        torch.testing.assert_close(
            tensor.grad.view_as(MASK), TENSORS[name][index], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
    actual = trl_metrics(output.metrics, options)
    if options["loss_type"] == "vespo":
        actual["vespo/phi_seq_mean"] = of_sequences.mean().item()
    assert expected.keys() - {"policy_loss", "entropy_coef"} == actual.keys()
    for name, value in actual.items():
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def vespo(options: dict[str, Any]) -> Tensor:
    """[B]: VESPO's weights of the completions."""
    logprobs = poisoned(TENSORS["logprobs"])
    return vespo_weights(
        logprobs,
        poisoned(TENSORS["old_logprobs"]) if options["has_old_logprobs"] else logprobs,
        TENSORS["advantages"],
        torch.arange(len(MASK) + 1, device=DEVICE) * MASK.shape[1],
        MASK.flatten(),
        VespoParams(**{name.removeprefix("vespo_"): options[name] for name in options if name.startswith("vespo_")}),
        poisoned(TENSORS["token_sampling_ratio"]) if options["importance_sampling_ratio"] else None,
    )


def poisoned(values: Tensor) -> Tensor:
    """[B, L] to [B · L], with NaN where no token counts."""
    return values.masked_fill(~MASK, math.nan).flatten()


def token_weights(options: dict[str, Any]) -> Tensor:
    """[B · L]: these completions are one of `accumulation_steps` micro-batches of an optimizer step."""
    steps = options["accumulation_steps"]
    weights = sequence_weights(
        MASK.sum(1),
        options["loss_type"],
        max_completion_length=RECORDING["max_completion_length"],
        total_sequences=steps * len(MASK),
        total_tokens=RECORDING["items_in_batch"] * steps / options["steps_per_generation"],
        micro_batch_size=len(MASK),
        total_micro_batches=steps,
    )
    return weights.repeat_interleave(MASK.shape[1])


def entropy_weights(options: dict[str, Any], bonus_mask: Tensor) -> Tensor:
    """[B · L]: the bonus is the mean over the micro-batch's tokens that the entropy mask keeps."""
    normaliser = bonus_mask.sum().clamp(min=1) * options["accumulation_steps"]
    return options["entropy_coef"] * bonus_mask.flatten() / normaliser


def trl_metrics(metrics: LossMetrics, options: dict[str, Any]) -> dict[str, float]:
    """TRL's means of one micro-batch. At sequence level it counts fully masked completions, as never clipped."""
    values = {name: value.item() for name, value in metrics._asdict().items()}
    by_sequence = options["importance_sampling_level"] == "sequence"
    count = len(MASK) if by_sequence else values["clip_count"]
    means = {"entropy": values["entropy_sum"] / values["token_count"]}
    if options["beta"]:
        means["kl"] = values["kl_sum"] / values["token_count"]
    if options["loss_type"] == "cispo":
        means["cispo_clip_ratio"] = values["clip_high_sum"] / count
    elif options["loss_type"] not in ("sapo", "vespo"):
        for name in ("low", "high", "region"):
            means[f"clip_ratio/{name}_mean"] = values[f"clip_{name}_sum"] / count
        means["clip_ratio/low_min"] = min(values["clip_low_seq_min"], 0 if by_sequence else math.inf)
        means["clip_ratio/high_max"] = values["clip_high_seq_max"]
    return means


def test_the_recording_covers_every_option_and_does_clip() -> None:
    assert {case["options"]["loss_type"] for case in CASES} == set(LOSS_TYPES)
    for level in ("token", "sequence"):
        metrics = [case["metrics"] for case in CASES if case["options"]["importance_sampling_level"] == level]
        for name in ("low_mean", "high_mean"):
            assert sum(values.get(f"clip_ratio/{name}", 0) > 0 for values in metrics) >= 10
        assert sum(values.get("cispo_clip_ratio", 0) > 0 for values in metrics) >= 3
    scale = TENSORS["policy_scale"][:, MASK]
    assert ((scale == 0).any(1) & (scale != 0).any(1)).sum() >= 20
    assert not MASK[-1].any(), "the last completion is fully masked"
