"""What every op computes, in short plain torch: the specification, and the tests' oracle.

Layout: the T tokens of N sequences are concatenated; `cu_seqlens` [N + 1] int64 holds each sequence's start and, last,
T. Half precision is computed in float32, float64 stays. Autograd derives the gradients. Inputs are checked by the
public functions, not here.
"""

from fastgrpo_kernels.reference.attention import decode_attention, paged_attention, rope_and_cache
from fastgrpo_kernels.reference.layers import (
    add_norm,
    apply_rotary,
    layer_norm,
    merge_attention,
    quick_gelu,
    rms_norm,
    swiglu,
    thin_gated_linear,
    thin_linear,
    thin_linear_parts,
)
from fastgrpo_kernels.reference.logprob import linear_logprob, logprob_from_logits
from fastgrpo_kernels.reference.loss import grpo_loss
from fastgrpo_kernels.reference.policy_scale import (
    ImportanceCorrection,
    VespoParams,
    importance_ratio,
    off_policy_mask,
    vespo_weights,
)
from fastgrpo_kernels.reference.sampling import sample

__all__ = [
    "ImportanceCorrection",
    "VespoParams",
    "add_norm",
    "apply_rotary",
    "decode_attention",
    "grpo_loss",
    "importance_ratio",
    "layer_norm",
    "linear_logprob",
    "logprob_from_logits",
    "merge_attention",
    "off_policy_mask",
    "paged_attention",
    "quick_gelu",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "swiglu",
    "thin_gated_linear",
    "thin_linear",
    "thin_linear_parts",
    "vespo_weights",
]
