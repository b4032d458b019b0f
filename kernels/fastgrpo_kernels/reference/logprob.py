"""Log-probs of targets, from logits or from hidden states, in plain torch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels.reference.checks import check_range, check_temperature, computing_dtype, shape_of
from fastgrpo_kernels.types import LogprobOutput

_CHUNK_COPIES = 8
"""float32 [rows, V] buffers alive at once, at most, in the backward pass of one chunk of `linear_logprob`."""


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
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {shape_of(logits)}, targets {shape_of(targets)} do not fit: pass [N, V] and [N].")
    check_temperature(temperature)
    check_range("targets", targets, logits.shape[1], ignore_index)
    rows = torch.arange(len(targets), device=logits.device)
    return _logprob_rows(logits, rows, targets, temperature, entropy, ignore_index)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    byte_budget: int = 1 << 30,
) -> LogprobOutput:
    """`logprob_from_logits(hidden[rows] @ weight.T, targets)` without ever holding [N, V].

    Works through chunks of hidden rows and recomputes each chunk's logits in the backward pass. A row's
    logits are computed once per pass however many targets read it; for that, `rows` on a CUDA device are read
    back. The product is taken in the inputs' dtype, all else in float32.

    Args:
        hidden: [T, H].
        weight: [V, H].
        targets: [N] int64.
        rows: [N] int64, the hidden row that target n reads; None: target n reads row n, and N = T.
        byte_budget: bytes of scratch that a chunk may take; one row is taken at least. Beside it the gradient
            of `weight` needs two [V, H] buffers.

    Raises:
        ValueError: as `logprob_from_logits`; `rows` missing where N ≠ T, or (CPU only) outside 0..T−1.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {shape_of(hidden)}, weight {shape_of(weight)} do not fit: pass [T, H] and [V, H].")
    if targets.ndim != 1 or targets.shape != (hidden.shape[:1] if rows is None else rows.shape):
        reason = f"one per row of hidden {shape_of(hidden)}, or pass rows" if rows is None else "one per entry of rows"
        raise ValueError(f"targets {shape_of(targets)} do not fit: pass {reason}.")
    check_temperature(temperature)
    check_range("targets", targets, weight.shape[0], ignore_index)
    chunk_rows = max(1, byte_budget // (4 * _CHUNK_COPIES * weight.shape[0]))
    local, order, sizes = torch.arange(len(targets), device=hidden.device), None, [chunk_rows]
    if rows is None:
        sizes = [len(chunk) for chunk in local.split(chunk_rows)]
    else:
        check_range("rows", rows, hidden.shape[0])
        used, local, readers = rows.unique(return_inverse=True, return_counts=True)
        order = local.argsort(stable=True)  # targets of one hidden row side by side
        hidden, targets, local = hidden[used], targets[order], local[order]
        sizes = [int(chunk.sum()) for chunk in readers.split(chunk_rows)]

    def run_chunk(chunk: Tensor, chunk_local: Tensor, chunk_targets: Tensor) -> LogprobOutput:
        logits = F.linear(chunk, weight)
        return _logprob_rows(logits, chunk_local, chunk_targets, temperature, entropy, ignore_index)

    chunks = zip(hidden.split(chunk_rows), (local % chunk_rows).split(sizes), targets.split(sizes), strict=True)
    outputs = [checkpoint(run_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    back = slice(None) if order is None else order.argsort()
    logprobs = torch.cat([output.logprobs for output in outputs])[back]
    return LogprobOutput(logprobs, torch.cat([o.entropy for o in outputs])[back] if entropy else None)


def _logprob_rows(
    logits: Tensor, rows: Tensor, targets: Tensor, temperature: float, entropy: bool, ignore_index: int
) -> LogprobOutput:
    """Targets [N] that read rows [N] of logits [R, V]."""
    ignored = targets == ignore_index
    scaled = logits.to(computing_dtype(logits)) / temperature
    # log_softmax of a row of −inf alone is NaN, forward and backward.
    dead = scaled.detach().amax(dim=-1) == -math.inf  # [R]
    logp = torch.log_softmax(scaled.masked_fill(dead[:, None], 0.0), dim=-1)
    logprobs = logp[rows, targets.masked_fill(ignored, 0)]
    logprobs = logprobs.masked_fill(dead[rows], -math.inf).masked_fill(ignored, 0.0)
    if not entropy:
        return LogprobOutput(logprobs, None)
    # 0 · −inf counts as 0.
    by_row = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(dim=-1)  # [R]
    return LogprobOutput(logprobs, by_row[rows].masked_fill(ignored | dead[rows], 0.0))
