"""Every op in plain torch: the executable specification, the CPU path and the tests' oracle.

Layout: the T tokens of N sequences lie one after the other; `cu_seqlens` [N + 1] int64 holds each sequence's
start and, last, T. Half precision is computed in float32, float64 stays; outputs come in the computing dtype.
Values are checked on CPU only, so that nothing waits for a device; shapes are checked everywhere.
"""

from fastgrpo_kernels.reference.attention import paged_attention, rope_and_cache
from fastgrpo_kernels.reference.logprob import linear_logprob, logprob_from_logits
from fastgrpo_kernels.reference.loss import grpo_loss
from fastgrpo_kernels.reference.sampling import sample

__all__ = ["grpo_loss", "linear_logprob", "logprob_from_logits", "paged_attention", "rope_and_cache", "sample"]
