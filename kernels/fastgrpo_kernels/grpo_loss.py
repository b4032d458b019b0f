"""The GRPO loss over packed tokens: its value, its gradient and every logged metric from one launch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import check_loss_inputs
from fastgrpo_kernels.grpo_loss_kernels import SURROGATES, loss_kernel, reduce_kernel
from fastgrpo_kernels.tl_utils import launch
from fastgrpo_kernels.types import Level, LossMetrics, LossOutput, LossParams, Surrogate

_SUMS = (
    "loss",
    "token_count",
    "kl_sum",
    "entropy_sum",
    "clip_count",
    "clip_low_sum",
    "clip_high_sum",
    "clip_region_sum",
)
_MINIMA = ("clip_low_seq_min",)
_MAXIMA = ("clip_high_seq_max",)
_COLUMNS = (*_SUMS, *_MINIMA, *_MAXIMA)
"""A program's results for its sequence, in the order in which the kernel stores them."""

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
        "entropy": entropy,
        "entropy_weights": entropy_weights,
    }
    check_loss_inputs(logprobs, params, tensors)
    if pick_backend(logprobs, backend) == "torch" or logprobs.dtype == torch.float64:
        return reference.grpo_loss(logprobs, params=params, **tensors)  # type: ignore[arg-type]
    loss, totals, _ = _operator(logprobs, *tensors.values(), *astuple(params))
    metrics = dict(zip(_COLUMNS, totals.unbind(), strict=True))
    return LossOutput(loss, LossMetrics(**{name: metrics[name] for name in LossMetrics._fields}))


def _run(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Nine tensors and the fields of `LossParams` → the loss, its totals and its gradient, all float32."""
    totals, gradient = launch_grpo_loss(logprobs, *arguments[:9], params=LossParams(*arguments[9:]))
    return totals[0].clone(), totals, gradient


def _fake(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    totals = logprobs.new_empty(len(_COLUMNS), dtype=torch.float32)
    return totals.new_empty(()), totals, totals.new_empty(logprobs.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, mask, entropy_weights = inputs[0], inputs[6], inputs[9]
    _, totals, gradient = output
    ctx.mark_non_differentiable(totals, gradient)
    ctx.save_for_backward(logprobs, gradient, mask, entropy_weights)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Scales the gradient from the forward pass by the upstream scalar."""
    logprobs, gradient, mask, entropy_weights = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.inputs
    gradients[0] = (upstream * gradient).to(logprobs.dtype)
    if ctx.needs_input_grad[8] and entropy_weights is not None:
        counted = entropy_weights if mask is None else entropy_weights.masked_fill(~mask, 0.0)
        gradients[8] = -upstream * counted
    return tuple(gradients)


_operator = register_operator(
    "grpo_loss(Tensor logprobs, Tensor advantages, Tensor weights, Tensor cu_seqlens, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? mask, Tensor? policy_scale, Tensor? entropy, Tensor? entropy_weights, "
    "str surrogate, str level, float epsilon_low, float epsilon_high, float? delta, float beta, "
    "bool kl_bias_correction, float sapo_temperature_pos, float sapo_temperature_neg) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
)


def launch_grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    policy_scale: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    *,
    params: LossParams,
) -> tuple[Tensor, Tensor]:
    """Totals [10] in the order of `_COLUMNS` and the loss's gradient [T] by log-prob, both float32.

    Inputs are those of `grpo_loss`, checked by it. One program for each of the N sequences, on grid axis x.
    """
    sequences = len(advantages)
    # [T]; 0 for tokens of no sequence
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
        launch_grpo_loss(values(tokens, dtype), values(sequences), values(tokens), offsets, params=params, **optional)

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
