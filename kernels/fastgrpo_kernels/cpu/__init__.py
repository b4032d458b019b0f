"""Ops that plain torch can compute faster, or in less memory, than `reference` does: the same results.

They run on anything but CUDA tensors; an op that is not here runs as its reference. Inputs are checked by the public
functions, not here.
"""

from fastgrpo_kernels.cpu.attention import paged_attention, rope_and_cache, write_cache
from fastgrpo_kernels.cpu.layers import rms_norm, swiglu
from fastgrpo_kernels.cpu.linear_logprob import linear_logprob
from fastgrpo_kernels.cpu.sampling import sample

__all__ = [
    "linear_logprob",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "swiglu",
    "write_cache",
]
