"""`linear_logprob` on Triton: under the interpreter in float32 and float16, on a GPU in bfloat16 too.

Values and gradients are compared with float64 truth, entry by entry: as near as `rounding_bounds` says for the data.
"""

import math
from typing import NamedTuple

import pytest
import torch
from fastgrpo_kernels import LogprobOutput, linear_logprob
from rounding import assert_within, of_product, of_terms, unit
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


class Problem(NamedTuple):
    """Inputs, and a gradient for each output."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor | None
    grad_logprobs: Tensor
    grad_entropy: Tensor


def problem(
    tokens: int = 63,
    vocabulary: int = 1021,
    width: int = 96,
    dtype: torch.dtype = torch.float32,
    *,
    shared: bool = False,
    scale: float = 3.0,
) -> Problem:
    """Logits of standard deviation `scale`; two targets ignored, a third of gradients zero, rows shared by ten."""
    generator = torch.Generator().manual_seed(tokens + vocabulary + width)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * scale * width**-0.5
    rows = torch.randint(tokens, (2 * tokens,), generator=generator) // 5 if shared else None
    count = tokens if rows is None else len(rows)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    targets[1:3] = IGNORED
    grads = torch.randn(2, count, generator=generator)
    grads[:, count // 3 : 2 * count // 3] = 0
    rows = rows if rows is None else rows.to(DEVICE)
    return Problem(
        hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE), rows, *grads.to(DEVICE).unbind()
    )


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None, temperature: float, entropy: bool
) -> LogprobOutput:
    """As one would write it, in the inputs' dtype."""
    logp = torch.log_softmax((hidden if rows is None else hidden[rows]) @ weight.T / temperature, dim=-1)
    ignored = targets == IGNORED
    logprobs = logp.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1).masked_fill(ignored, 0.0)
    return LogprobOutput(logprobs, -(logp.exp() * logp).sum(-1).masked_fill(ignored, 0.0) if entropy else None)


def triton(hidden: Tensor, *args: Tensor, keep: bool = True, **options: object) -> LogprobOutput:
    """Keeps everything, or makes it again in chunks of at most a third of the columns (of 1021)."""
    byte_budget = 1 << 30 if keep else max(1, len(hidden) // 3 * 1024 * hidden.element_size())
    return linear_logprob(hidden, *args, byte_budget=byte_budget, backend="triton", **options)  # type: ignore[arg-type]


def run(op, case: Problem, dtype: torch.dtype, *, temperature: float = 1.0, entropy: bool = True, **options):  # type: ignore[no-untyped-def]
    """Outputs and gradients by name, in float64."""
    hidden, weight = (x.detach().clone().to(dtype).requires_grad_() for x in (case.hidden, case.weight))
    output = op(hidden, weight, case.targets, rows=case.rows, temperature=temperature, entropy=entropy, **options)
    loss = (output.logprobs * case.grad_logprobs).sum()
    if entropy:
        loss = loss + (output.entropy * case.grad_entropy).sum()
    loss.backward()
    found = {"logprobs": output.logprobs, "hidden.grad": hidden.grad, "weight.grad": weight.grad}
    if entropy:
        found["entropy"] = output.entropy
    return {name: value.detach().double() for name, value in found.items()}


def rounding_bounds(case: Problem, *, temperature: float, entropy: bool) -> dict[str, Tensor]:
    """How far each entry may be off, to first order: sums of products in float32 in any order; the exponentials, the
    gradient of the logits and the results once rounded to the inputs' dtype."""
    dtype, u = case.hidden.dtype, unit(torch.float32)
    half = unit(dtype) if dtype != torch.float32 else 0.0
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # float16 cannot tell less from 0
    rows = torch.arange(len(case.targets), device=DEVICE) if case.rows is None else case.rows
    x, w = case.hidden.double(), case.weight.double()
    vocabulary, counted = len(w), case.targets != IGNORED
    at = case.targets.masked_fill(~counted, 0)[:, None]

    z = (x @ w.T / temperature)[rows]  # [N, V]
    z_off = (of_product(case.hidden, case.weight.T) / temperature)[rows] + 4 * u * z.abs()
    lse, top = z.logsumexp(-1, keepdim=True), z.amax(-1, keepdim=True)
    logp = z - lse
    p, h = logp.exp(), -(logp.exp() * logp).sum(-1, keepdim=True)
    exp_off = z_off + u * (4 + 2 * (top - z))  # relative, of exp(z − top)
    lse_off = (p * exp_off).sum(-1, keepdim=True) + of_terms(vocabulary) + 4 * u * (lse.abs() + top.abs())
    logp_off = z_off + lse_off + 4 * u * (z.abs() + lse.abs())
    h_off = (p * (logp + h).abs() * exp_off).sum(-1, keepdim=True) + of_terms(vocabulary) * h
    h_off = h_off + lse_off * of_terms(1) + 8 * u * (lse.abs() + top.abs())
    bounds = {"logprobs": logp_off.gather(1, at).squeeze(1), "entropy": h_off.squeeze(1)}

    g, e = ((grad * counted).double()[:, None] for grad in (case.grad_logprobs, case.grad_entropy))
    e = e if entropy else torch.zeros_like(e)
    p_off = p * (logp_off + half + 8 * u) + least
    dz = torch.zeros_like(p).scatter_(1, at, g) - p * (g + e * (logp + h))
    dz_off = p_off * (g.abs() + e.abs() * (logp + h).abs()) + p * e.abs() * (logp_off + half + h_off)
    dz_off = (dz_off + (half + 8 * u) * (dz.abs() + p * (g.abs() + e.abs() * h)) + least) / temperature

    def by_row(values: Tensor) -> Tensor:
        return torch.zeros(len(x), vocabulary, dtype=torch.float64, device=DEVICE).index_add_(0, rows, values)

    size, off = by_row(dz.abs() / temperature), by_row(dz_off)
    bounds["hidden.grad"] = off @ w.abs() + of_product(size, w) + half * (size @ w.abs()) + least
    bounds["weight.grad"] = off.T @ x.abs() + of_product(size.T, x) + half * (size.T @ x.abs()) + least
    return bounds


def assert_exact_up_to_rounding(case: Problem, *, temperature: float, entropy: bool, keep: bool = True) -> None:
    exact = run(plain, case, torch.float64, temperature=temperature, entropy=entropy)
    found = run(triton, case, case.hidden.dtype, temperature=temperature, entropy=entropy, keep=keep)
    bounds = rounding_bounds(case, temperature=temperature, entropy=entropy)
    for name, truth in exact.items():
        assert_within(found[name], truth, bounds[name], name)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width", "temperature", "entropy", "shared"),
    [
        (1, 1000, 96, 1.0, True, False),
        (63, 1021, 128, 0.1, True, True),
        (63, 1000, 96, 1.0, False, True),
        (257, 1021, 96, 1.0, True, False),
        (257, 1000, 128, 0.1, False, False),
    ],
)
def test_outputs_and_gradients_are_exact_up_to_rounding(
    tokens: int,
    vocabulary: int,
    width: int,
    temperature: float,
    entropy: bool,
    shared: bool,
    dtype: torch.dtype,
    keep: bool,
) -> None:
    case = problem(tokens, vocabulary, width, dtype, shared=shared)
    assert_exact_up_to_rounding(case, temperature=temperature, entropy=entropy, keep=keep)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_certain_targets_keep_their_precision(dtype: torch.dtype, entropy: bool) -> None:
    """1 − p near 0: where bfloat16 log-probs lose most."""
    case = problem(63, 1000, 96, dtype, scale=3.0)
    best = (case.hidden.double() @ case.weight.double().T).argmax(-1)
    assert_exact_up_to_rounding(case._replace(targets=best), temperature=0.25, entropy=entropy)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_that_are_next_to_impossible(dtype: torch.dtype, keep: bool) -> None:
    """Log-probs of −100 and below: beside the row's others, the target's exponential is 0."""
    case = problem(63, 1021, 96, dtype, scale=3.0)
    worst = (case.hidden.double() @ case.weight.double().T).argmin(-1)
    worst[::3] = case.targets[::3]
    assert_exact_up_to_rounding(case._replace(targets=worst), temperature=0.08, entropy=False, keep=keep)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_cancel_and_targets_that_repeat(dtype: torch.dtype, keep: bool) -> None:
    """Each row is read by four targets, two of them the same; the row's gradients add up to nothing or nearly so."""
    case = problem(21, 1021, 96, dtype)
    rows = torch.arange(84, device=DEVICE) % 21
    targets = torch.randint(1021, (84,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[63:] = targets[:21]
    pattern = torch.tensor([0.5, 1.0, -2.0, 0.5], device=DEVICE).repeat_interleave(21)
    nearly = pattern + 1e-7 * (torch.arange(84, device=DEVICE) % 2)
    case = case._replace(targets=targets, rows=rows, grad_logprobs=nearly, grad_entropy=torch.zeros_like(nearly))
    assert_exact_up_to_rounding(case, temperature=1.0, entropy=False, keep=keep)


@pytest.mark.parametrize("entropy", [True, False])
def test_logits_of_ten_thousand_are_finite(entropy: bool) -> None:
    case = problem(scale=1e4)
    exact = run(plain, case, torch.float64, entropy=entropy)
    ours = run(triton, case, torch.float32, entropy=entropy)
    for name, truth in exact.items():
        # The logits' own rounding: float32 holds 4e4 to 0.004, and so a probability to 0.4 %.
        torch.testing.assert_close(ours[name], truth, atol=0.01 * float(truth.abs().max()), rtol=0)


def test_suppressed_vocabulary_has_no_probability() -> None:
    """Logits of −inf, whole tiles of them: weights of −inf before positive hidden states."""
    case = problem(7, 1021, 96)
    hidden, weight = case.hidden.abs(), case.weight.clone()
    weight[128:640] = -math.inf
    targets = torch.tensor([0, 127, 640, 1020, 5, 6, 128], device=DEVICE)
    output = triton(hidden, weight, targets, entropy=True)
    kept = torch.cat([weight[:128], weight[640:]])
    index = torch.where(targets < 128, targets, targets - 512)
    expected = plain(hidden[:6], kept, index[:6], rows=None, temperature=1.0, entropy=True)
    torch.testing.assert_close(output.logprobs[:6], expected.logprobs)
    torch.testing.assert_close(output.entropy[:6], expected.entropy)
    assert output.logprobs[6] == -math.inf


def test_a_row_without_any_finite_logit_is_guarded() -> None:
    hidden = torch.ones(3, 96, device=DEVICE, requires_grad=True)
    weight = torch.full((300, 96), -math.inf, device=DEVICE)
    output = triton(hidden, weight, torch.zeros(3, dtype=torch.long, device=DEVICE), entropy=True)
    assert (output.logprobs == -math.inf).all()
    assert (output.entropy == 0).all()
    (output.logprobs + output.entropy).sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_and_recompute_agree(dtype: torch.dtype) -> None:
    case = problem(dtype=dtype, shared=True)
    kept, again = (run(triton, case, dtype, keep=keep) for keep in (True, False))
    for name in kept:
        # dhidden is summed chunk by chunk, dW over rows that lie elsewhere: another order in float32.
        exact = name in ("logprobs", "entropy")
        size = float(kept[name].abs().max())
        tolerance = 0.0 if exact else size * max(2 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(kept[name], again[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tokens", "keep"), [(63, True), (63, False), (2, False)])
def test_rows_without_gradient_are_never_read_backward(tokens: int, keep: bool) -> None:
    """NaN in their hidden states reaches no gradient; a product over them would spread it."""
    case = problem(tokens, 300)
    idle = (case.grad_logprobs == 0) | (case.targets == IGNORED)
    poisoned = case._replace(hidden=case.hidden.masked_fill(idle[:, None], math.nan))
    expected = run(triton, case, torch.float32)
    hidden, weight = poisoned.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    output = triton(hidden, weight, case.targets, entropy=True, keep=keep)
    used = output.logprobs[~idle] * case.grad_logprobs[~idle] + output.entropy[~idle] * case.grad_entropy[~idle]
    used.sum().backward()
    torch.testing.assert_close(hidden.grad.double(), expected["hidden.grad"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), expected["weight.grad"], rtol=1e-5, atol=1e-5)


def test_no_gradient_at_all_gives_zeros() -> None:
    for keep in (True, False):
        case = problem()
        case.grad_logprobs.zero_(), case.grad_entropy.zero_()
        found = run(triton, case, torch.float32, keep=keep)
        assert (found["hidden.grad"] == 0).all()
        assert (found["weight.grad"] == 0).all()


def test_buffers_that_were_not_zeroed_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `empty` comes full of NaN."""
    expected = {keep: run(triton, problem(), torch.float32, keep=keep) for keep in (True, False)}
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **options):  # type: ignore[no-untyped-def]
            tensor = _original(*args, **options)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, poisoned)
    for keep, values in expected.items():
        found = run(triton, problem(), torch.float32, keep=keep)
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "recompute"])
def test_frozen_inputs_get_no_gradient(keep: bool) -> None:
    case = problem()
    for trained in ("hidden", "weight"):
        inputs = {name: getattr(case, name).clone().requires_grad_(name == trained) for name in ("hidden", "weight")}
        output = triton(*inputs.values(), case.targets, entropy=True, keep=keep)
        (output.logprobs @ case.grad_logprobs + output.entropy @ case.grad_entropy).backward()
        expected = run(triton, case, torch.float32, keep=keep)
        assert [name for name, x in inputs.items() if x.grad is not None] == [trained]
        torch.testing.assert_close(inputs[trained].grad.double(), expected[f"{trained}.grad"], rtol=0, atol=0)
    assert not triton(case.hidden, case.weight, case.targets).logprobs.requires_grad


def test_without_gradients_nothing_is_kept() -> None:
    case = problem()
    with torch.no_grad():
        small = triton(case.hidden.clone().requires_grad_(), case.weight, case.targets, keep=False)
        large = triton(case.hidden.clone().requires_grad_(), case.weight, case.targets)
    torch.testing.assert_close(small.logprobs, large.logprobs, rtol=0, atol=0)


def test_float32_weight_under_half_precision_hidden_states() -> None:
    case = problem(dtype=torch.float16)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.float().requires_grad_()
    output = triton(hidden, weight, case.targets, entropy=True)
    (output.logprobs @ case.grad_logprobs + output.entropy @ case.grad_entropy).backward()
    expected = run(triton, case, torch.float16)
    assert weight.grad.dtype == torch.float32
    # As float32 it may be summed in another order.
    torch.testing.assert_close(weight.grad.double(), expected["weight.grad"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), expected["hidden.grad"], rtol=0, atol=0)


def test_a_second_backward_pass_of_the_kept_buffer_is_refused() -> None:
    case = problem()
    output = triton(case.hidden.clone().requires_grad_(), case.weight, case.targets)
    output.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.logprobs.sum().backward()


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool, keep: bool) -> None:
    def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, **options: object) -> LogprobOutput:
        def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return tuple(triton(hidden, weight, targets, **options))  # type: ignore[arg-type]

        return LogprobOutput(*checkpoint(call, hidden, weight, use_reentrant=reentrant))

    found, expected = (run(op, problem(), torch.float32, keep=keep) for op in (checkpointed, triton))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_non_contiguous_inputs() -> None:
    case = problem(shared=True)
    expected = run(triton, case, torch.float32)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in (case.targets, case.rows)]
    hidden, weight = case.hidden.T.contiguous().T.requires_grad_(), case.weight.T.contiguous().T.requires_grad_()
    output = triton(hidden, weight, strided[0], rows=strided[1], entropy=True)
    (output.logprobs @ case.grad_logprobs + output.entropy @ case.grad_entropy).backward()
    for name, value in {"logprobs": output.logprobs, "hidden.grad": hidden.grad, "weight.grad": weight.grad}.items():
        torch.testing.assert_close(value.detach().double(), expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_give_empty_outputs_and_zero_gradients(backend: str) -> None:
    weight = torch.randn(300, 96, device=DEVICE, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long, device=DEVICE)
    for tokens, rows in ((0, None), (0, empty), (5, empty)):
        hidden = torch.randn(tokens, 96, device=DEVICE, requires_grad=True)
        output = linear_logprob(hidden, weight, empty, rows=rows, entropy=True, backend=backend)  # type: ignore[arg-type]
        assert output.logprobs.shape == output.entropy.shape == (0,)
        (output.logprobs.sum() + output.entropy.sum()).backward()
        assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()
