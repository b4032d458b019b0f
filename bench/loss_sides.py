"""The GRPO loss as we and plain torch compute it, behind one signature."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from fastgrpo_kernels import LossParams, grpo_loss
from torch import Tensor

PARAMS = LossParams(beta=0.04)


@dataclass(frozen=True)
class LossInputs:
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

    def double(self) -> "LossInputs":
        """In float64, for exact results."""
        floats = {f.name: getattr(self, f.name).double() for f in fields(self) if f.name != "cu_seqlens"}
        return replace(self, **floats)


@dataclass(frozen=True)
class LossResult:
    """Forward and backward."""

    loss: Tensor
    grad_logprobs: Tensor
    """[T]"""
    metrics: dict[str, Tensor]
    """Sums over tokens: kl, clip_low, clip_high."""


@dataclass(frozen=True)
class LossSide:
    """One implementation."""

    name: str
    apply: Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]]
    """The differentiable loss, and the metrics."""
    forward_only: bool = False

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            return self.apply(inputs)

    def forward_backward(self, inputs: LossInputs) -> LossResult:
        logprobs = inputs.logprobs.detach().requires_grad_()
        loss, metrics = self.apply(replace(inputs, logprobs=logprobs))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        return LossResult(loss.detach(), gradient, metrics)


def make_loss_inputs(tokens: int, device: str, sequences: int = 64) -> LossInputs:
    """float32; a good part of the ratios is clipped, none so near a bound that rounding decides. `sequences` divides
    `tokens`."""
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
        advantages=normal(sequences),
        cu_seqlens=torch.arange(0, tokens + 1, tokens // sequences, device=device),
    )


def plain_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Operation by operation, as trainers write it."""
    low, high = 1 - PARAMS.epsilon_low, 1 + PARAMS.epsilon_high
    length = len(inputs.logprobs) // len(inputs.advantages)
    advantage = inputs.advantages.repeat_interleave(length)  # [T]
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    surrogate = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    difference = inputs.ref_logprobs - inputs.logprobs
    kl = difference.exp() - difference - 1
    loss = (inputs.weights * (surrogate + PARAMS.beta * kl)).sum()
    with torch.no_grad():
        metrics = {
            "kl": kl.sum(),
            "clip_low": ((ratio < low) & (advantage < 0)).sum(),
            "clip_high": ((ratio > high) & (advantage > 0)).sum(),
        }
    return loss, metrics


def exact_loss(inputs: LossInputs) -> LossResult:
    """`plain_loss` in float64."""
    return LossSide("exact", plain_loss).forward_backward(inputs.double())


def our_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss`: Triton on CUDA, the reference on CPU."""
    loss, metrics = grpo_loss(
        inputs.logprobs,
        inputs.advantages,
        inputs.weights,
        inputs.cu_seqlens,
        PARAMS,
        old_logprobs=inputs.old_logprobs,
        ref_logprobs=inputs.ref_logprobs,
    )
    named = {
        "kl": metrics.kl_sum,
        "clip_low": metrics.clip_low_sum,
        "clip_high": metrics.clip_high_sum,
    }
    return loss, named


def loss_errors(result: LossResult, exact: LossResult) -> dict[str, float]:
    """Relative error of the gradient (Frobenius norm), and of the loss and each metric."""
    gradient = torch.linalg.norm(result.grad_logprobs.double() - exact.grad_logprobs)
    errors = {"grad_logprobs": float(gradient / torch.linalg.norm(exact.grad_logprobs))}
    for name, value, true in [
        ("loss", result.loss, exact.loss),
        *((name, value, exact.metrics[name]) for name, value in result.metrics.items()),
    ]:
        errors[name] = abs(float(value) - float(true)) / max(abs(float(true)), 1.0)
    return errors


def loss_sides() -> list[LossSide]:
    """Ours first. Liger's loss starts from logits: it is compared with the head's sides."""
    compiled = torch.compile(plain_loss, dynamic=False)
    return [LossSide("fastgrpo", our_loss), LossSide("torch", plain_loss), LossSide("compile", compiled)]
