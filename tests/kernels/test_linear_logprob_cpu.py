"""`linear_logprob` on CPU: against the reference in float64, and what it multiplies and holds at most."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrpo_kernels import LogprobOutput, linear_logprob, logprob_from_logits, reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

IGNORED = -100
ROWS = {
    "own row each": None,
    "shared prompt rows": [0, 0, 0, 1, 2, 9, 9, 3, 0, 9, 5],
    "unordered": [10, 3, 7, 3, 0, 10, 1],
    "one target": [4],
}


def weighted(output: LogprobOutput) -> Tensor:
    """A scalar that gives every output a gradient of its own."""
    coefficients = torch.linspace(-1.0, 2.0, len(output.logprobs), dtype=torch.float64)
    assert output.entropy is not None
    return (coefficients * output.logprobs).sum() + (coefficients.flip(0) * output.entropy).sum()


def operations(run: Callable[[], None]) -> list[tuple[str, list[list[int]]]]:
    """Every torch operation that it performs, inside operators too, and its inputs' shapes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    return [(event.name, event.input_shapes) for event in profiler.events()]


def products(run: Callable[[], None]) -> list[list[list[int]]]:
    """Shapes of both sides of every matrix product."""
    return [shapes[:2] for name, shapes in operations(run) if name == "aten::mm"]


@pytest.mark.parametrize("byte_budget", [1, 11 * 4 * 4 * 100, 1 << 30])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_it_is_the_reference(rows: list[int] | None, byte_budget: int) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (11, 1021))
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    index = None if rows is None else torch.tensor(rows)
    targets = torch.randint(1021, (11 if rows is None else len(rows),))
    targets[len(targets) // 3] = IGNORED
    options = {"rows": index, "temperature": 0.8, "entropy": True}
    output = linear_logprob(hidden, weight, targets, byte_budget=byte_budget, **options)
    expected = reference.linear_logprob(exact_hidden, exact_weight, targets, **options)
    weighted(output).backward()
    weighted(expected).backward()
    found = (*output, hidden.grad, weight.grad)
    for name, ours, exact in zip(
        ("logprobs", "entropy", "hidden.grad", "weight.grad"),
        found,
        (*expected, exact_hidden.grad, exact_weight.grad),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck_of_hidden_and_weight() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    rows, targets = torch.tensor([5, 0, 0, 2, 5]), torch.tensor([1, 12, IGNORED, 4, 4])
    assert torch.autograd.gradcheck(
        lambda h, w: tuple(linear_logprob(h, w, targets, rows=rows, entropy=True, byte_budget=1)), (hidden, weight)
    )


def test_each_hidden_row_is_multiplied_once() -> None:
    rows = torch.tensor([0] * 8 + [1, 2, 3] * 4)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(50, 4)

    def run() -> None:
        output = linear_logprob(hidden, weight, rows, rows=rows, byte_budget=4000)  # room for a tile, not to keep it
        output.logprobs[rows < 2].sum().backward()

    # Forward the rows that a target reads; backward those with a gradient: their logits again, and their gradient.
    assert products(run) == [[[4, 4], [4, 50]], [[2, 4], [4, 50]], [[2, 50], [50, 4]]]
    assert (hidden.grad[2:] == 0).all()


def test_few_logits_are_kept_and_an_entropy_that_is_only_looked_at_does_not_change_that() -> None:
    """Asked for as a metric, as the policy does: no second product of the logits in the backward pass."""
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (9, 40))

    def run() -> None:
        output = linear_logprob(hidden, weight, torch.arange(9), entropy=True, backend="torch")
        output.logprobs.sum().backward()

    assert products(run) == [[[9, 6], [6, 40]], [[9, 40], [40, 6]], [[40, 9], [9, 6]]]


@pytest.mark.parametrize(("vocabulary", "count"), [(65_536, 3), (65_537, 9 * 4)])
def test_many_logits_are_made_again(vocabulary: int, count: int) -> None:
    """Up to 16 MiB of exponentials are kept. Beyond, in tiles of 2 MiB: the logits, again, and two gradients."""
    hidden, weight = (torch.randn(n, 1, requires_grad=True) for n in (64, vocabulary))

    def run() -> None:
        linear_logprob(hidden, weight, torch.arange(64), backend="torch").logprobs.sum().backward()

    assert len(products(run)) == count


def test_memory_stays_within_a_tile_forward_and_backward() -> None:
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (256, 1000))
    targets = torch.randint(1000, (256,))

    def run() -> None:
        weighted(linear_logprob(hidden, weight, targets, entropy=True, byte_budget=4 * 4 * 256 * 64)).backward()

    largest = max(math.prod(shape) for _, shapes in operations(run) for shape in shapes)
    assert largest == 256 * 64  # a tile of 64 columns; all 1000 would be 256,000


def test_no_tokens_give_empty_outputs_and_zero_gradients() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    for rows in (None, empty):
        output = linear_logprob(hidden, weight, empty, rows=rows, entropy=True)
        assert output.logprobs.shape == output.entropy.shape == (0,)
        (output.logprobs.sum() + output.entropy.sum()).backward()
    assert (weight.grad == 0).all()
    assert logprob_from_logits(torch.randn(0, 9), empty, entropy=True).logprobs.shape == (0,)


def test_frozen_inputs_need_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True)
    linear_logprob(hidden, weight, torch.tensor([0, 1, 2])).logprobs.sum().backward()
    assert weight.grad.abs().sum() > 0
    assert not linear_logprob(hidden, weight.detach(), torch.tensor([0, 1, 2])).logprobs.requires_grad


class CountProducts(TorchDispatchMode):
    """Matrix products that run inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_without_gradients_the_vocabulary_is_cut_as_with_them() -> None:
    """And so gives the same bits: the KL term of a policy against itself is 0."""
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(1000, 32)
    targets = torch.randint(1000, (64,))
    with_gradients = linear_logprob(hidden, weight, targets).logprobs
    with torch.no_grad(), CountProducts() as products:
        without = linear_logprob(hidden, weight, targets).logprobs
    assert products.count <= 4
    assert torch.equal(with_gradients, without)
