"""Logits to tokens and their log-probs, as we and plain torch do it, and the exact results."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastgrpo_kernels import SampleOutput, SampleParams, sample
from fastgrpo_kernels.reference.sampling import process_scores
from torch import Tensor

SETTINGS = {
    "plain": SampleParams(),
    "top_k": SampleParams(top_k=50),
    "filtered": SampleParams(0.7, top_k=50, top_p=0.9, min_p=0.05),
    "greedy": SampleParams(temperature=0.0),
}
ALLOWED_SHARE = 0.05
"""Of rows whose token may differ from float64's: two scores alike up to rounding, or one at a truncation's edge."""


@dataclass(frozen=True)
class SampleInputs:
    """A decode step's logits."""

    logits: Tensor
    """[B, V] float32"""
    params: SampleParams
    seeds: Tensor
    """[B] int64"""
    counters: Tensor
    """[B] int64"""
    suppressed: Tensor
    """[V] bool"""


@dataclass(frozen=True)
class ExactSample:
    """What float64 makes of it."""

    tokens: Tensor
    """[B]: our draw; plain torch has noise of its own."""
    logprobs: Tensor
    """[B, V], of the tempered softmax."""
    sampling_logprobs: Tensor
    """[B, V], of the distribution drawn from."""


@dataclass(frozen=True)
class Drawn:
    """A side's result."""

    output: SampleOutput
    has_our_noise: bool


@dataclass(frozen=True)
class SampleSide:
    """One implementation. There are no gradients: both passes are the one there is."""

    name: str
    apply: Callable[[SampleInputs], SampleOutput]
    forward_only: bool = False

    def forward(self, inputs: SampleInputs) -> Drawn:
        return self.forward_backward(inputs)

    def forward_backward(self, inputs: SampleInputs) -> Drawn:
        return Drawn(self.apply(inputs), self.name == "fastgrpo")


def make_sample_inputs(rows: int, vocabulary: int, setting: str, device: str) -> SampleInputs:
    """Logits with a spread of 3; two tokens suppressed."""
    torch.manual_seed(0)
    suppressed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    suppressed[[3, 4]] = True
    index = torch.arange(rows, device=device)
    return SampleInputs(
        3 * torch.randn(rows, vocabulary, device=device), SETTINGS[setting], 7919 * index, index, suppressed
    )


def exact_sample(inputs: SampleInputs) -> ExactSample:
    """float64 throughout, but for the noise, which is defined in float32."""
    logits, params = inputs.logits.double(), inputs.params
    tokens = sample(
        logits,
        params,
        seeds=inputs.seeds,
        counters=inputs.counters,
        suppressed=inputs.suppressed,
        backend="torch",
    ).tokens
    scores = process_scores(logits, params, None, inputs.suppressed)
    return ExactSample(tokens, (logits / (params.temperature or 1.0)).log_softmax(dim=-1), scores.log_softmax(dim=-1))


def sample_errors(result: Drawn, exact: ExactSample) -> dict[str, float]:
    """Greatest absolute errors in nats; and shares of rows that drew another token, or one left out, beyond what
    rounding explains."""
    chosen = result.output.tokens[:, None]
    logprobs, sampling = (x.gather(1, chosen).squeeze(1) for x in (exact.logprobs, exact.sampling_logprobs))
    kept = sampling.isfinite()
    errors = {
        "logprobs": float((result.output.logprobs.double() - logprobs).abs().max()),
        "sampling_logprobs": float((result.output.sampling_logprobs.double() - sampling)[kept].abs().amax()),
        "left_out": max(0.0, 1 - kept.double().mean().item() - ALLOWED_SHARE),
    }
    if result.has_our_noise:
        different = (result.output.tokens != exact.tokens).double().mean().item()
        errors["tokens"] = max(0.0, different - ALLOWED_SHARE)
    return errors


def sample_sides() -> list[SampleSide]:
    """Ours, and plain torch."""
    return [SampleSide("fastgrpo", _ours), SampleSide("torch", _plain)]


def _ours(inputs: SampleInputs) -> SampleOutput:
    return sample(
        inputs.logits,
        inputs.params,
        seeds=inputs.seeds,
        counters=inputs.counters,
        suppressed=inputs.suppressed,
    )


def _plain(inputs: SampleInputs) -> SampleOutput:
    """As trainers write it: filters one after the other, a softmax, a draw, two log-softmaxes.

    The draw is what `multinomial` computes, without its checks of the weights, which wait for the device.
    """
    params = inputs.params
    tempered = inputs.logits / (params.temperature or 1.0)
    scores = tempered.masked_fill(inputs.suppressed, -torch.inf)
    if 0 < params.top_k < scores.shape[1]:
        least = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if params.top_p < 1:
        descending, order = scores.sort(dim=-1, descending=True)
        weights = descending.softmax(dim=-1)
        cut = weights.cumsum(dim=-1) - weights >= params.top_p
        scores = scores.masked_fill(cut.gather(1, order.argsort(dim=-1)), -torch.inf)
    if params.min_p > 0:
        weights = scores.softmax(dim=-1)
        scores = scores.masked_fill(weights < params.min_p * weights.amax(dim=-1, keepdim=True), -torch.inf)
    greedy = params.temperature == 0
    drawn_from = scores if greedy else scores.softmax(dim=-1) / torch.empty_like(scores).exponential_()
    tokens = drawn_from.argmax(dim=-1, keepdim=True)
    full, kept = (x.log_softmax(dim=-1).gather(1, tokens).squeeze(1) for x in (tempered, scores))
    return SampleOutput(tokens.squeeze(1), full, kept)
