"""GRPO's operations over flat (packed) tokens. Usable alone: imports torch and triton and nothing of fastgrpo."""

from fastgrpo_kernels.activations import quick_gelu, swiglu
from fastgrpo_kernels.add_norm import add_norm
from fastgrpo_kernels.decode_attention import decode_attention
from fastgrpo_kernels.grpo_loss import grpo_loss
from fastgrpo_kernels.kv_cache import rope_and_cache
from fastgrpo_kernels.linear_logprob import linear_logprob
from fastgrpo_kernels.merge_attention import merge_attention
from fastgrpo_kernels.norms import layer_norm, rms_norm
from fastgrpo_kernels.paged_attention import paged_attention
from fastgrpo_kernels.reference import (
    ImportanceCorrection,
    VespoParams,
    importance_ratio,
    logprob_from_logits,
    off_policy_mask,
    vespo_weights,
)
from fastgrpo_kernels.rotary import apply_rotary
from fastgrpo_kernels.sampling import sample
from fastgrpo_kernels.thin_linear import is_thin, thin_gated_linear, thin_linear, thin_linear_parts
from fastgrpo_kernels.types import (
    LogprobOutput,
    LossMetrics,
    LossOutput,
    LossParams,
    PagedLayout,
    SampleOutput,
    SampleParams,
    Surrogate,
)

__all__ = [
    "ImportanceCorrection",
    "LogprobOutput",
    "LossMetrics",
    "LossOutput",
    "LossParams",
    "PagedLayout",
    "SampleOutput",
    "SampleParams",
    "Surrogate",
    "VespoParams",
    "add_norm",
    "apply_rotary",
    "decode_attention",
    "grpo_loss",
    "importance_ratio",
    "is_thin",
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
