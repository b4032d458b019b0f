"""The GRPO loss as we and plain torch compute it. Liger's starts from logits: it is compared with the head's sides."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from fastgrpo_kernels import LossParams, grpo_loss
from torch import Tensor

from sides import Op, Results, Side, Work

PARAMS = LossParams(beta=0.04)
SEQUENCES = 64
Losses = tuple[Tensor, Results]
"""The differentiable loss, and sums over tokens: kl, clip_low, clip_high."""


class LossInputs(NamedTuple):
    """Sequences of equal length, one after the other. All but `cu_seqlens` in one float dtype."""

    logprobs: Tensor
    """[T]"""
    old_logprobs: Tensor
    """[T]"""
    ref_logprobs: Tensor
    """[T]"""
    weights: Tensor
    """[T]"""
    advantages: Tensor
    """[S]"""
    cu_seqlens: Tensor
    """[S + 1] int64"""


def loss_op(tokens: int, device: str) -> Op:
    """`grpo_loss` in float32 with KL and metrics, both passes: four inputs read and the gradient written, each once."""
    return Op(
        name="loss",
        shape=f"T={tokens} float32",
        make_inputs=lambda: _inputs(tokens, device),
        sides=lambda: [
            side("fastgrpo", _ours),
            side("torch", plain_loss),
            side("compile", torch.compile(plain_loss, dynamic=False)),
        ],
        exact=lambda x: side("exact", plain_loss).run(
            x._replace(**{name: t.double() for name, t in x._asdict().items() if name != "cu_seqlens"})
        ),
        tolerance=1e-5,
        work=Work(5.0 * 4 * tokens, "copy"),
    )


def side(name: str, losses: Callable[[LossInputs], Losses]) -> Side:
    """Both passes of a loss."""

    def run(x: LossInputs) -> Results:
        logprobs = x.logprobs.detach().requires_grad_()
        loss, metrics = losses(x._replace(logprobs=logprobs))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        return {"loss": loss.detach(), "grad_logprobs": gradient, **metrics}

    return Side(name, run)


def _inputs(tokens: int, device: str) -> LossInputs:
    """float32; a good part of the ratios is clipped, none so near a bound that rounding decides."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, device=device)

    old, log_ratio = -normal(tokens).abs(), 0.2 * normal(tokens)
    for bound in (1 - PARAMS.epsilon_low, 1 + PARAMS.epsilon_high):
        log_ratio.masked_fill_((log_ratio.exp() - bound).abs() < 1e-4, 0.0)
    return LossInputs(
        logprobs=old + log_ratio,
        old_logprobs=old,
        ref_logprobs=old + 0.2 * normal(tokens),
        weights=torch.full((tokens,), 1 / tokens, device=device),
        advantages=normal(SEQUENCES),
        cu_seqlens=torch.arange(0, tokens + 1, tokens // SEQUENCES, device=device),
    )


def plain_loss(x: LossInputs) -> Losses:
    """Operation by operation, as trainers write it."""
    low, high = 1 - PARAMS.epsilon_low, 1 + PARAMS.epsilon_high
    advantage = x.advantages.repeat_interleave(len(x.logprobs) // len(x.advantages))  # [T]
    ratio = (x.logprobs - x.old_logprobs).exp()
    surrogate = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    difference = x.ref_logprobs - x.logprobs
    kl = difference.exp() - difference - 1
    loss = (x.weights * (surrogate + PARAMS.beta * kl)).sum()
    with torch.no_grad():
        metrics = {
            "kl": kl.sum(),
            "clip_low": ((ratio < low) & (advantage < 0)).sum(),
            "clip_high": ((ratio > high) & (advantage > 0)).sum(),
        }
    return loss, metrics


def _ours(x: LossInputs) -> Losses:
    """`grpo_loss`: Triton on CUDA, the reference on CPU."""
    logprobs = {"old_logprobs": x.old_logprobs, "ref_logprobs": x.ref_logprobs}
    loss, metrics = grpo_loss(x.logprobs, x.advantages, x.weights, x.cu_seqlens, PARAMS, **logprobs)
    return loss, {"kl": metrics.kl_sum, "clip_low": metrics.clip_low_sum, "clip_high": metrics.clip_high_sum}
