"""Sampling where nothing but suppression and temperature changes the logits, in half of the reference's passes."""

import torch
from torch import Tensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.reference.sampling import uniforms
from fastgrpo_kernels.types import SampleOutput, SampleParams

_LEAST_KEPT = 0.1
"""Probability of what is not suppressed, below which it and its share lose digits."""
_LANE = 64
"""Scores that are compared at once."""


def sample(
    logits: Tensor,
    params: SampleParams,
    *,
    seeds: Tensor,
    counters: Tensor,
    seen: Tensor | None = None,
    suppressed: Tensor | None = None,
) -> SampleOutput:
    """`fastgrpo_kernels.sample`. Reads values on the host.

    argmax(s + Gumbel noise) is argmax(exp(s) / E), E exponential: so one softmax serves the draw and both log-probs.
    """
    is_plain = params.temperature > 0 and not params.top_k and params.top_p == 1.0 and params.min_p == 0.0
    if is_plain and (seen is None or params.repetition_penalty == 1.0):
        raw = logits.to(computing_dtype(logits))
        probs = (raw if params.temperature == 1.0 else raw * (1.0 / params.temperature)).softmax(dim=-1)
        kept = None
        if suppressed is not None:
            ids = suppressed.nonzero().squeeze(1)
            kept = 1.0 - probs.index_select(1, ids).sum(dim=-1)
            probs.index_fill_(1, ids, 0.0)
        if kept is None or bool((kept > _LEAST_KEPT).all()):
            minus_e = uniforms(seeds, counters, logits.shape[1]).neg_().log1p_()  # in (−∞, 0)
            tokens = _argmin(probs / minus_e)
            logprobs = probs.gather(1, tokens[:, None]).squeeze(1).log()
            return SampleOutput(tokens, logprobs.float(), (logprobs if kept is None else logprobs - kept.log()).float())
    return reference.sample(logits, params, seeds=seeds, counters=counters, seen=seen, suppressed=suppressed)


def _argmin(x: Tensor) -> Tensor:
    """First of each row's [B, V] smallest: torch's own compares one number at a time."""
    if x.shape[1] % _LANE:
        return x.argmin(dim=-1)
    lanes = x.unflatten(1, (-1, _LANE))
    lane = lanes.amin(dim=-1).argmin(dim=-1)
    return lane * _LANE + lanes[torch.arange(len(x), device=x.device), lane].argmin(dim=-1)
