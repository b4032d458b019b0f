"""Times the ops on this machine, each against the plain formula, after checking that both agree. `make bench`."""

from collections.abc import Callable

import pytest
import torch
from fastgrpo_kernels import LossParams, grpo_loss, linear_logprob
from torch import Tensor

ROWS, HIDDEN, VOCABULARY = 512, 256, 32_000


def plain_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The whole [T, V] at once, as one would write it."""
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None]).squeeze(1)


def forward_backward(op: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = op(hidden, weight, targets).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.fixture
def head() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.mark.benchmark(group="log-probs of targets, forward and backward")
@pytest.mark.parametrize("name", ["chunked", "plain"])
def test_linear_logprob(benchmark, head, name):
    ops = {"chunked": lambda *inputs: linear_logprob(*inputs).logprobs, "plain": plain_logprob}
    for ours, theirs in zip(*(forward_backward(op, *head) for op in ops.values()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    benchmark.pedantic(forward_backward, args=(ops[name], *head), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="clipped loss of 65,536 tokens, forward and backward")
def test_grpo_loss(benchmark):
    generator = torch.Generator().manual_seed(0)
    tokens, sequences = 65_536, 256
    old = -torch.rand(tokens, generator=generator)
    logprobs = (old + 0.1 * torch.randn(tokens, generator=generator)).requires_grad_()
    advantages = torch.randn(sequences, generator=generator)
    weights = torch.full((tokens,), 1 / tokens)
    offsets = torch.arange(0, tokens + 1, tokens // sequences)

    def step() -> Tensor:
        return torch.autograd.grad(
            grpo_loss(logprobs, advantages, weights, offsets, LossParams(), old_logprobs=old).loss, logprobs
        )[0]

    ratio, spread = (logprobs - old).exp(), advantages.repeat_interleave(tokens // sequences)
    kept = ratio * spread <= ratio.clamp(0.8, 1.2) * spread
    torch.testing.assert_close(step(), torch.where(kept, -ratio * spread / tokens, 0.0), rtol=1e-4, atol=1e-9)
    benchmark.pedantic(step, rounds=20, warmup_rounds=2)
