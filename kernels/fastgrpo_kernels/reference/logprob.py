"""Log-probs of targets, from logits or from hidden states."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo_kernels.checks import check_logits, computing_dtype
from fastgrpo_kernels.types import LogprobOutput


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> LogprobOutput:
    """Log-probs of targets [N] int64 under logits [N, V] of any float dtype, in float32.

    A logit of −inf has probability 0 and adds 0 to the entropy. A row of −inf alone gives log-prob −inf and
    entropy 0, without gradient. A target equal to `ignore_index` gives 0 and 0, without gradient.

    Raises:
        ValueError: wrong shapes, temperature not positive, or (CPU only) a target outside 0..V−1. On a CUDA
            device such a target trips the device-side assertion of indexing.
    """
    check_logits(logits, targets, temperature, ignore_index)
    ignored = targets == ignore_index
    scaled = logits.to(computing_dtype(logits)) / temperature
    # log_softmax of a row of −inf alone is NaN, forward and backward.
    dead = scaled.detach().amax(dim=-1) == -math.inf  # [N]
    logp = torch.log_softmax(scaled.masked_fill(dead[:, None], 0.0), dim=-1)
    logprobs = logp.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    logprobs = logprobs.masked_fill(dead, -math.inf).masked_fill(ignored, 0.0)
    if not entropy:
        return LogprobOutput(logprobs, None)
    # 0 · −inf counts as 0.
    entropies = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(dim=-1)
    return LogprobOutput(logprobs, entropies.masked_fill(ignored | dead, 0.0))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> LogprobOutput:
    """`logprob_from_logits` of the logits hidden[rows] · weightᵀ, taken in hidden's dtype: all [N, V] of them."""
    logits = F.linear(hidden if rows is None else hidden[rows], weight.to(hidden.dtype))
    return logprob_from_logits(logits, targets, temperature=temperature, entropy=entropy, ignore_index=ignore_index)
