"""`linear_logprob` on CPU with few logits: their exponentials are kept, and nothing else changes."""

import pytest
import torch
from fastgrpo_kernels import linear_logprob
from torch import Tensor

TOKENS, HIDDEN, VOCABULARY = 9, 6, 40
RECOMPUTE = 1
"""Bytes of scratch with which nothing is kept."""


def results(budget: int, *, dtype: torch.dtype, entropy: bool, chosen: Tensor, temperature: float) -> list[Tensor]:
    """Log-probs, entropies, gradients of hidden and weight; only `chosen` targets [N] have a gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    rows = torch.tensor([7, 2, 2, 5, 0, 7, 2])  # shared, out of order; 1, 3, 4, 6, 8 are read by none
    targets = torch.tensor([3, 39, 0, -100, 12, 12, 8])
    output = linear_logprob(
        hidden,
        weight,
        targets,
        rows=rows,
        entropy=entropy,
        temperature=temperature,
        byte_budget=budget,
        backend="torch",
    )
    upstream = torch.linspace(-1, 2, len(rows), dtype=output.logprobs.dtype) * chosen
    loss = output.logprobs @ upstream
    if output.entropy is not None:
        loss = loss + 0.3 * (output.entropy @ upstream)
    loss.backward()
    return [x for x in (output.logprobs, output.entropy, hidden.grad, weight.grad) if x is not None]


@pytest.mark.parametrize("chosen", [[1] * 7, [0, 1, 1, 0, 0, 1, 0], [0] * 7])
@pytest.mark.parametrize(("entropy", "temperature"), [(False, 1.0), (False, 0.7), (True, 0.7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_it_is_what_is_computed_again(
    dtype: torch.dtype, tolerance: float, entropy: bool, temperature: float, chosen: list[int]
) -> None:
    options = {"dtype": dtype, "entropy": entropy, "temperature": temperature, "chosen": torch.tensor(chosen)}
    pairs = zip(results(1 << 20, **options), results(RECOMPUTE, **options), strict=True)
    for kept, again in pairs:
        torch.testing.assert_close(kept, again, rtol=tolerance, atol=tolerance)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    hidden, weight = (torch.randn(n, HIDDEN, requires_grad=True) for n in (TOKENS, VOCABULARY))
    output = linear_logprob(hidden, weight, torch.arange(TOKENS), backend="torch")
    output.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.logprobs.sum().backward()
