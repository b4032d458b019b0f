"""Logits to tokens and their log-probs, as we and plain torch do it."""

from typing import Any, NamedTuple

import torch
from fastgrpo_kernels import SampleOutput, SampleParams, sample
from fastgrpo_kernels.reference.sampling import process_scores
from torch import Tensor

from sides import Op, Results, Side, Work

SETTINGS = {
    "plain": SampleParams(),
    "top_k": SampleParams(top_k=50),
    "filtered": SampleParams(0.7, top_k=50, top_p=0.9, min_p=0.05),
    "greedy": SampleParams(temperature=0.0),
}
ALLOWED_SHARE = 0.05
"""Of rows whose token may differ from float64's: two scores alike up to rounding, or one at a truncation's edge."""


class SampleInputs(NamedTuple):
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


def sample_op(rows: int, vocabulary: int, setting: str, device: str) -> Op:
    """`sample` on float32 logits, as the decoder's head gives them; `setting` of `SETTINGS`."""
    return Op(
        name="sample",
        shape=f"B={rows} V={vocabulary} {setting}",
        make_inputs=lambda: _inputs(rows, vocabulary, setting, device),
        sides=lambda: [Side("fastgrpo", _ours), Side("torch", _plain)],
        exact=_exact,
        errors=_errors,
        tolerance=1e-4,
        work=Work(4.0 * rows * vocabulary, "copy"),
    )


def _inputs(rows: int, vocabulary: int, setting: str, device: str) -> SampleInputs:
    """Logits with a spread of 3; two tokens suppressed."""
    torch.manual_seed(0)
    suppressed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    suppressed[[3, 4]] = True
    index = torch.arange(rows, device=device)
    logits = 3 * torch.randn(rows, vocabulary, device=device)
    return SampleInputs(logits, SETTINGS[setting], 7919 * index, index, suppressed)


def _drawn(x: SampleInputs, logits: Tensor, **options: Any) -> SampleOutput:
    return sample(logits, x.params, seeds=x.seeds, counters=x.counters, suppressed=x.suppressed, **options)


def _ours(x: SampleInputs) -> Results:
    output = _drawn(x, x.logits)
    return {**output._asdict(), "our_draw": output.tokens}


def _exact(x: SampleInputs) -> Results:
    """Log-probs [B, V] in float64, but for the noise, which is defined in float32; and the tokens [B] that it draws."""
    logits = x.logits.double()
    return {
        "our_draw": _drawn(x, logits, backend="torch").tokens,
        "logprobs": (logits / (x.params.temperature or 1.0)).log_softmax(dim=-1),
        "sampling_logprobs": process_scores(logits, x.params, None, x.suppressed).log_softmax(dim=-1),
    }


def _errors(found: Results, exact: Results) -> dict[str, float]:
    """Greatest absolute errors in nats; and shares of rows that drew another token, or one left out, beyond what
    rounding explains. Plain torch has noise of its own."""
    chosen = found["tokens"][:, None]
    logprobs, sampling = (exact[name].gather(1, chosen).squeeze(1) for name in ("logprobs", "sampling_logprobs"))
    kept = sampling.isfinite()
    errors = {
        "logprobs": float((found["logprobs"].double() - logprobs).abs().max()),
        "sampling_logprobs": float((found["sampling_logprobs"].double() - sampling)[kept].abs().amax()),
        "left_out": max(0.0, 1 - kept.double().mean().item() - ALLOWED_SHARE),
    }
    if "our_draw" in found:
        different = (found["our_draw"] != exact["our_draw"]).double().mean().item()
        errors["tokens"] = max(0.0, different - ALLOWED_SHARE)
    return errors


def _plain(x: SampleInputs) -> Results:
    """As trainers write it: filters one after the other, a softmax, a draw, two log-softmaxes.

    The draw is what `multinomial` computes, without its checks of the weights, which wait for the device.
    """
    params = x.params
    tempered = x.logits / (params.temperature or 1.0)
    scores = tempered.masked_fill(x.suppressed, -torch.inf)
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
    full, kept = (y.log_softmax(dim=-1).gather(1, tokens).squeeze(1) for y in (tempered, scores))
    return {"tokens": tokens.squeeze(1), "logprobs": full, "sampling_logprobs": kept}
