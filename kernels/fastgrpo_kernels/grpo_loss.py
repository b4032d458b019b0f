"""The GRPO loss over packed tokens: its value, its gradient and every logged metric from one launch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo_kernels.backend import Backend, pick_backend
from fastgrpo_kernels.grpo_loss_kernels import SURROGATES, loss_kernel, reduce_kernel
from fastgrpo_kernels.reference import loss as reference
from fastgrpo_kernels.tl_utils import launch
from fastgrpo_kernels.types import Level, LossMetrics, LossOutput, LossParams, Surrogate

_SUMS = (
    "loss",
    "token_count",
    "sequence_count",
    "kl_sum",
    "entropy_sum",
    "clip_count",
    "clip_low_sum",
    "clip_high_sum",
    "clip_region_sum",
    "ratio_sum",
)
_MINIMA = ("clip_low_seq_min", "ratio_min")
_MAXIMA = ("clip_high_seq_max", "ratio_max")
_COLUMNS = (*_SUMS, *_MINIMA, *_MAXIMA)
"""What a program finds of its sequence, in the order in which the kernel stores it."""

_BLOCK = 1024
"""Tokens of a sequence read at a time, and sequences reduced at a time."""
_WARPS = 16
"""Two tokens a thread; at 8 warps triton 3.6.0 spills on sm_100. Neither was timed on a GPU."""


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    params: LossParams,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    policy_scale: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    backend: Backend | None = None,
) -> LossOutput:
    """Σ_t weight_t (scale_t surrogate_t + beta kl_t) − entropy_weight_t entropy_t, and its metrics.

    Formulas, arguments, edges and errors are those of `reference.grpo_loss`. In Triton, the loss can be differentiated
    once, with respect to `logprobs` and `entropy`; half precision is computed in float32; equal inputs give equal bits,
    since no sum depends on the order in which programs end. float64 is always computed by the reference.

    Args:
        backend: torch or triton; None: Triton for CUDA tensors, torch for all others (see `pick_backend`).
    """
    tensors = {
        "advantages": advantages,
        "weights": weights,
        "cu_seqlens": cu_seqlens,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "mask": mask,
        "policy_scale": policy_scale,
        "entropy_weights": entropy_weights,
    }
    if pick_backend(logprobs, backend) == "torch" or logprobs.dtype == torch.float64:
        return reference.grpo_loss(logprobs, params=params, entropy=entropy, **tensors)  # type: ignore[arg-type]
    reference.check_loss_inputs(logprobs, params, {**tensors, "entropy": entropy})
    loss, totals = _GrpoLoss.apply(logprobs, entropy, tensors, params)
    metrics = dict(zip(_COLUMNS, totals.unbind(), strict=True))
    return LossOutput(loss, LossMetrics(**{name: metrics[name] for name in LossMetrics._fields}))


class _GrpoLoss(torch.autograd.Function):
    """The forward has the gradient already; the backward multiplies it by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, tensors: dict[str, Tensor | None], params: LossParams
    ) -> tuple[Tensor, Tensor]:
        totals, gradient = _loss_and_gradient(logprobs, entropy=entropy, **tensors, **asdict(params))
        ctx.save_for_backward(logprobs, gradient, tensors["mask"], tensors["entropy_weights"])
        ctx.mark_non_differentiable(totals)
        return totals[0].clone(), totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, gradient, mask, entropy_weights = ctx.saved_tensors
        entropy_gradient = None
        if ctx.needs_input_grad[1] and entropy_weights is not None:
            counted = entropy_weights if mask is None else entropy_weights.masked_fill(~mask, 0.0)
            entropy_gradient = -upstream * counted
        return (upstream * gradient).to(logprobs.dtype), entropy_gradient, None, None


@torch.library.custom_op("fastgrpo::grpo_loss", mutates_args=())
def _loss_and_gradient(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    policy_scale: Tensor | None,
    entropy: Tensor | None,
    entropy_weights: Tensor | None,
    surrogate: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    kl_bias_correction: bool,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    kl_cap: float,
) -> tuple[Tensor, Tensor]:
    """`launch_grpo_loss` as torch.compile sees it: an operator of tensors and numbers, `LossParams` spelt out."""
    params = LossParams(
        surrogate=surrogate,  # type: ignore[arg-type]
        level=level,  # type: ignore[arg-type]
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        kl_bias_correction=kl_bias_correction,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        kl_cap=kl_cap,
    )
    return launch_grpo_loss(
        logprobs,
        advantages,
        weights,
        cu_seqlens,
        params,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        policy_scale=policy_scale,
        entropy=entropy,
        entropy_weights=entropy_weights,
    )


@_loss_and_gradient.register_fake
def _(logprobs: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    totals = logprobs.new_empty(len(_COLUMNS), dtype=torch.float32)
    return totals, logprobs.new_empty(logprobs.shape, dtype=torch.float32)


def launch_grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    params: LossParams,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    policy_scale: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Totals [14] in the order of `_COLUMNS` and the loss's gradient [T] by log-prob, both float32.

    Inputs are those of `grpo_loss`, checked by it. One program for each of the N sequences, on grid axis x.
    """
    sequences = len(advantages)
    # [T]; tokens that no sequence holds have none
    gradient = torch.zeros_like(logprobs, dtype=torch.float32, memory_format=torch.contiguous_format)
    partials = gradient.new_empty(len(_COLUMNS), sequences)
    totals = gradient.new_empty(len(_COLUMNS))
    flags = None if mask is None else mask.contiguous().view(torch.uint8)
    per_token = (weights, old_logprobs, ref_logprobs, policy_scale, entropy, entropy_weights)
    if sequences > 0:
        launch(
            loss_kernel,
            (sequences,),
            cu_seqlens.contiguous(),
            advantages.contiguous(),
            flags,
            logprobs.contiguous(),
            *(None if values is None else values.contiguous() for values in per_token),
            gradient,
            partials,
            float(params.beta),
            float(params.kl_cap),
            1.0 - params.epsilon_low,
            float(params.epsilon_high) if params.surrogate == "cispo" else 1.0 + params.epsilon_high,
            math.inf if params.delta is None else float(params.delta),
            float(params.sapo_temperature_pos),
            float(params.sapo_temperature_neg),
            SURROGATE=SURROGATES[params.surrogate],
            SEQUENCE_LEVEL=params.level == "sequence",
            KL_TIMES_RATIO=params.kl_bias_correction,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    launch(
        reduce_kernel,
        (len(_COLUMNS),),
        partials,
        totals,
        sequences,
        SUMS=len(_SUMS),
        MINIMA=len(_MINIMA),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return totals, gradient


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every surrogate and level, with and without the optional inputs, in float32 and bfloat16: 64k tokens, N = 64."""
    tokens, sequences = 65_536, 64

    def values(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    def case(params: LossParams, dtype: torch.dtype, optional: dict[str, Tensor]) -> None:
        offsets = values(sequences + 1, torch.int64)
        launch_grpo_loss(values(tokens, dtype), values(sequences), values(tokens), offsets, params, **optional)

    plain = {"mask": values(tokens, torch.bool), "entropy": values(tokens)}
    names = ("old_logprobs", "ref_logprobs", "policy_scale", "entropy_weights")
    full = {**plain, **{name: values(tokens) for name in names}}
    for surrogate in get_args(Surrogate):
        for level in get_args(Level):
            params = LossParams(surrogate, level)
            kl = replace(params, beta=0.04)
            label = f"grpo_loss {surrogate} {level}"
            yield label, partial(case, params, torch.float32, plain)
            yield f"{label} bfloat16", partial(case, params, torch.bfloat16, plain)
            yield f"{label} all inputs", partial(case, kl, torch.float32, full)
            corrected = replace(kl, kl_bias_correction=True)
            yield f"{label} all inputs, corrected KL", partial(case, corrected, torch.float32, full)
