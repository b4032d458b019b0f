"""`linear_logprob` inside what surrounds it: torch.compile, autocast, forced backends; and what it refuses."""

import os

import pytest
import torch
from fastgrpo_kernels import linear_logprob
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, generator=generator)
    weight = torch.randn(300, 32, generator=generator) * 32**-0.5
    targets = torch.randint(300, (9,), generator=generator)
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE)


def loss_and_gradients(function, inputs) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    loss = function(*inputs)
    return loss, *torch.autograd.grad(loss, inputs[:2])


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("byte_budget", [None, 4096], ids=["keep", "recompute"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, byte_budget: int | None, mode: str, inputs) -> None:  # type: ignore[no-untyped-def]
    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        output = linear_logprob(
            2 * hidden, weight, targets, entropy=True, temperature=0.7, byte_budget=byte_budget, backend=backend
        )
        return (output.logprobs + 0.1 * output.entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=mode)
    for found, expected in zip(loss_and_gradients(compiled, inputs), loss_and_gradients(step, inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_op_is_sound(backend: str, inputs) -> None:  # type: ignore[no-untyped-def]
    """Schema, fake implementation and autograd registration agree with what the op does."""
    hidden, weight, targets = inputs
    # The buffer that is kept is changed backward, on purpose: opcheck's gradients are of what is recomputed.
    args = (hidden, weight, targets, torch.arange(9, device=DEVICE), 1.0, True, -100, 4096, False)
    name = {"triton": "linear_logprob", "torch": "linear_logprob_cpu"}[backend]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.fastgrpo_kernels, name).default, args, test_utils=checks)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        ("triton", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_autocast_computes_as_the_cast_inputs_do(backend, dtype: torch.dtype, inputs) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets = inputs
    cast = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    with torch.autocast(DEVICE, dtype):
        found = loss_and_gradients(lambda *x: linear_logprob(*x, backend=backend).logprobs.sum(), inputs)
    expected = loss_and_gradients(lambda *x: linear_logprob(*x, backend=backend).logprobs.sum(), (*cast, targets))
    assert [x.dtype for x in found] == [torch.float32] * 3
    # A product that comes as float32 may be summed in another order than one that comes in 16 bits.
    rounding = torch.finfo(dtype).eps if DEVICE == "cuda" else 0.0
    for ours, theirs in zip(found, expected, strict=True):
        size = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=rounding, atol=rounding * size)


def test_float64_is_the_references() -> None:
    hidden, weight = torch.randn(2, 32, dtype=torch.float64), torch.randn(9, 32, dtype=torch.float64)
    targets = torch.tensor([0, 8])
    assert linear_logprob(hidden, weight, targets, backend="torch").logprobs.dtype == torch.float64
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(ValueError, match=r"hidden is torch\.float64"):
            linear_logprob(hidden, weight, targets, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on CPU only")
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_and_rows_out_of_range_are_refused(backend, inputs) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets = inputs
    for wrong in (-1, 300):
        with pytest.raises(ValueError, match=rf"targets\[0\]={wrong} is outside 0..299"):
            linear_logprob(hidden, weight, torch.full_like(targets, wrong), backend=backend)
        with pytest.raises(ValueError, match="rows"):
            linear_logprob(hidden, weight, targets, rows=torch.full_like(targets, wrong), backend=backend)


@pytest.mark.gpu
def test_targets_out_of_range_give_nan(inputs) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets = inputs
    targets[0], targets[1] = -1, 300
    assert linear_logprob(hidden, weight, targets).logprobs.isnan().tolist() == [True, True] + [False] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_do_not_fit_are_refused(backend, inputs) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets = inputs
    refused = {
        "do not fit: pass .T, H. and .V, H.": (hidden, weight.T, targets),
        "or pass rows": (hidden, weight, targets[:3]),
        "targets is on meta": (hidden, weight, targets.to("meta")),
        "weight is on meta": (hidden, weight.to("meta"), targets),
        "targets is torch.int32: pass torch.int64": (hidden, weight, targets.int()),
        "weight is torch.float16, hidden torch.float32": (hidden, weight.half(), targets),
        "weight is torch.bfloat16, hidden torch.float16": (hidden.half(), weight.bfloat16(), targets),
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            linear_logprob(*arguments, backend=backend)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(*inputs, temperature=0.0, backend=backend)
