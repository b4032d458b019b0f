"""`logprob_from_logits` against a float64 formula written row by row."""

import math
from itertools import pairwise

import pytest
import torch
from fastgrpo_kernels import linear_logprob, logprob_from_logits
from torch import Tensor

IGNORED = -100


def truth(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float64 log-probs and entropies, one row after the other; differentiable."""
    logprobs, entropies = [], []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        finite = row[row > -math.inf] / temperature
        shift = finite.detach().max()
        normaliser = shift + (finite - shift).exp().sum().log()
        logp = finite - normaliser
        ignored = target == IGNORED
        logprobs.append(0.0 * normaliser if ignored else row[target] / temperature - normaliser)
        entropies.append(0.0 * normaliser if ignored else -(logp.exp() * logp).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def weighted(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A scalar that gives every output a gradient of its own."""
    coefficients = torch.linspace(-1.0, 2.0, len(logprobs), dtype=torch.float64)
    return (coefficients * logprobs).sum() + (coefficients.flip(0) * entropy).sum()


def assert_close(name: str, actual: Tensor, expected: Tensor, atol: float, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.7])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1000), (63, 1021), (257, 1000)])
def test_logprobs_entropy_and_gradient_match_float64(count: int, vocabulary: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(count, vocabulary)).requires_grad_()
    targets = torch.randint(vocabulary, (count,))
    targets[count // 2] = IGNORED if count > 1 else targets[0]

    output = logprob_from_logits(logits, targets, temperature=temperature, entropy=True)
    exact_logits = logits.detach().double().requires_grad_()
    expected_logprobs, expected_entropy = truth(exact_logits, targets, temperature)

    assert output.logprobs.dtype == output.entropy.dtype == torch.float32
    assert_close("logprobs", output.logprobs, expected_logprobs, atol=1e-5 / temperature)
    assert_close("entropy", output.entropy, expected_entropy, atol=1e-5 / temperature)
    weighted(*output).backward()
    weighted(expected_logprobs, expected_entropy).backward()
    assert_close("logits.grad", logits.grad, exact_logits.grad, atol=1e-5 / temperature)


def test_half_precision_logits_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    logits = (20 * torch.randn(63, 1021)).bfloat16().requires_grad_()
    targets = torch.randint(1021, (63,))
    output = logprob_from_logits(logits, targets, entropy=True)
    expected_logprobs, expected_entropy = truth(logits.detach(), targets)
    assert_close("logprobs", output.logprobs, expected_logprobs, atol=2e-5)
    assert_close("entropy", output.entropy, expected_entropy, atol=2e-5)
    weighted(*output).backward()
    assert logits.grad.dtype == torch.bfloat16


def test_entropy_is_left_out_unless_asked() -> None:
    assert logprob_from_logits(torch.randn(2, 5), torch.tensor([0, 1])).entropy is None
    assert linear_logprob(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1])).entropy is None


def test_gradcheck_of_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, IGNORED, 10, 0, 3])
    assert torch.autograd.gradcheck(
        lambda x: tuple(logprob_from_logits(x, targets, temperature=0.7, entropy=True)), (logits,)
    )


def test_suppressed_logits_have_no_probability_and_finite_gradients() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9)
    logits[:, [2, 5]] = -math.inf
    logits.requires_grad_()
    targets = torch.tensor([0, 1, 3, 8])
    output = logprob_from_logits(logits, targets, entropy=True)
    expected_logprobs, expected_entropy = truth(logits.detach(), targets)
    assert_close("logprobs", output.logprobs, expected_logprobs, atol=1e-6)
    assert_close("entropy", output.entropy, expected_entropy, atol=1e-6)
    weighted(*output).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, [2, 5]] == 0).all()


def test_a_suppressed_target_has_log_prob_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    output = logprob_from_logits(logits, torch.tensor([1]))
    assert output.logprobs.item() == -math.inf
    output.logprobs.backward()
    assert logits.grad.isfinite().all()


def test_a_row_without_any_finite_logit_is_guarded() -> None:
    logits = torch.tensor([[-math.inf] * 3, [0.0, 1.0, 2.0]], requires_grad=True)
    output = logprob_from_logits(logits, torch.tensor([1, 1]), entropy=True)
    assert output.logprobs[0] == -math.inf
    assert output.entropy[0] == 0
    (output.logprobs[1] + output.entropy.sum()).backward()
    assert (logits.grad[0] == 0).all()
    assert logits.grad[1].isfinite().all()
    assert logits.grad[1].abs().sum() > 0


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_keep_their_precision(extreme: float) -> None:
    torch.manual_seed(0)
    spread = torch.randn(3, 50)
    logits = (extreme + spread).requires_grad_()
    targets = torch.tensor([0, 20, 49])
    output = logprob_from_logits(logits, targets, temperature=0.1, entropy=True)
    expected_logprobs, expected_entropy = truth(logits.detach(), targets, 0.1)
    # Rounding of z / τ itself: float32 resolves 1e5 to 0.008.
    assert_close("logprobs", output.logprobs, expected_logprobs, atol=0.02)
    assert_close("entropy", output.entropy, expected_entropy, atol=0.02)


def test_one_logit_far_above_the_rest_is_certain() -> None:
    logits = torch.full((1, 1000), -1e4)
    logits[0, 7] = 1e4
    output = logprob_from_logits(logits, torch.tensor([7]), entropy=True)
    assert output.logprobs.item() == 0
    assert output.entropy.item() == 0


def test_ignored_targets_give_zero_without_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    output = logprob_from_logits(logits, torch.tensor([IGNORED, 2, 6]), entropy=True, ignore_index=IGNORED)
    assert output.logprobs[0] == output.entropy[0] == 0
    (output.logprobs.sum() + output.entropy.sum()).backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1:].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("wrong", [-1, 7, 10**6])
def test_targets_outside_the_vocabulary_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"targets\[1\]={wrong} is outside 0..6"):
        logprob_from_logits(torch.randn(2, 7), torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match=rf"targets\[1\]={wrong} is outside 0..6"):
        linear_logprob(torch.randn(2, 3), torch.randn(7, 3), torch.tensor([0, wrong]))


def test_wrong_shapes_rows_and_temperatures_are_refused() -> None:
    hidden, weight, targets = torch.randn(4, 3), torch.randn(7, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="targets"):
        logprob_from_logits(torch.randn(4, 7), targets[:3])
    with pytest.raises(ValueError, match="or pass rows"):
        linear_logprob(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="one per entry of rows"):
        linear_logprob(hidden, weight, targets, rows=targets[:3])
    with pytest.raises(ValueError, match=r"rows\[0\]=4 is outside 0..3"):
        linear_logprob(hidden, weight, targets, rows=torch.full((4,), 4))
    with pytest.raises(ValueError, match="do not fit"):
        linear_logprob(hidden, weight.T, targets)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            logprob_from_logits(torch.randn(4, 7), targets, temperature=temperature)


def test_colder_is_surer() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    entropies = [
        logprob_from_logits(logits, torch.tensor([2]), temperature=t, entropy=True).entropy.item()
        for t in (0.1, 0.5, 1.0, 5.0, 100.0)
    ]
    assert all(colder < warmer for colder, warmer in pairwise(entropies))
    assert entropies[-1] == pytest.approx(math.log(3), abs=1e-3)
