"""The elementwise parts of layers against their formulas in float64: results, every gradient, every backend."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from fastgrpo_kernels import apply_rotary, layer_norm, merge_attention, quick_gelu, reference, rms_norm, swiglu
from fastgrpo_kernels.backend import Backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

BACKENDS: list[Backend] = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # the interpreter errs there
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of results of one rounding, relative to the largest."""


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """`torch.empty` and the like give NaN in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(
    op: Callable[..., Any], formula: Callable[..., Any], inputs: Sequence[Tensor], tolerance: float, factor: float = 4
) -> None:
    """Results within `tolerance` of the formula's in float64, gradients within `factor` times it."""
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = op(*ours), formula(*exact)
    found, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == inputs[0].dtype
        assert_near(one, other, tolerance)
    weights = [drawn(*x.shape, dtype=x.dtype, seed=9 + i) for i, x in enumerate(found)]
    gradients = torch.autograd.grad(found, ours, weights)
    truth = torch.autograd.grad(expected, exact, [w.double() for w in weights])
    for x, gradient, true in zip(inputs, gradients, truth, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        assert_near(gradient, true, factor * tolerance)


def assert_near(found: Tensor, exact: Tensor, tolerance: float) -> None:
    if exact.numel():
        assert (found - exact).abs().max() <= tolerance * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 1, 129), (2, 37, 80), (21, 7), (0, 16)])
def test_norms(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    weight, bias = drawn(shape[-1], seed=2), drawn(shape[-1], seed=3)  # in float32, whatever x is
    tolerance = 2 * TOLERANCE[dtype]  # of s, then of y
    rms, layer = partial(rms_norm, backend=backend), partial(layer_norm, backend=backend)

    def alone(norm: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *parameters: norm(x, *parameters, 1e-6)

    def added(norm: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, residual, *parameters: norm(x, *parameters, 1e-6, residual)

    check(alone(rms), alone(reference.rms_norm), [x, weight], tolerance, 16)
    check(added(rms), added(reference.rms_norm), [x, residual, weight], tolerance, 16)
    check(alone(layer), alone(reference.layer_norm), [x, weight, bias], tolerance, 16)
    check(added(layer), added(reference.layer_norm), [x, residual, weight, bias], tolerance, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_programs_of_the_backward_pass(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo_kernels.norms.MOST_PROGRAMS", 3)
    x, weight, bias = drawn(50, 24), drawn(24, seed=1), drawn(24, seed=2)
    check(
        lambda x, w, b: layer_norm(x, w, b, 1e-5, backend=backend),
        lambda x, w, b: reference.layer_norm(x, w, b, 1e-5),
        [x, weight, bias],
        1e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_whose_results_are_used_in_part(backend: Backend) -> None:
    x, residual = drawn(5, 16).requires_grad_(), drawn(5, 16, seed=1).requires_grad_()
    weight = drawn(16, seed=2)  # frozen
    y, total = rms_norm(x, weight, 1e-6, residual, backend=backend)
    exact, _ = reference.rms_norm(x.double(), weight.double(), 1e-6, residual.double())
    (alone,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    assert_near(alone, expected, 1e-5)
    both = torch.autograd.grad(total.sum(), [x, residual])
    assert all(torch.equal(gradient, torch.ones_like(x)) for gradient in both)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2000), (3, 1024), (2, 3, 5), (4, 0)])
def test_activations(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = 3 * drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    check(partial(swiglu, backend=backend), reference.swiglu, [gate, up], TOLERANCE[dtype])
    check(partial(quick_gelu, backend=backend), reference.quick_gelu, [gate], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_of_halves_of_one_tensor(backend: Backend) -> None:
    both = drawn(7, 2 * 33)

    def halves(op: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda both: op(*both.chunk(2, dim=-1))

    check(halves(partial(swiglu, backend=backend)), halves(reference.swiglu), [both], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-80.0, 80.0])
def test_activations_far_out_stay_finite(backend: Backend, value: float) -> None:
    x = torch.full((3,), value, device=DEVICE, requires_grad=True)
    out = swiglu(x, torch.ones_like(x), backend=backend) + quick_gelu(x, backend=backend)
    out.sum().backward()
    assert torch.allclose(out, torch.full_like(out, 2 * max(value, 0.0)))
    assert torch.allclose(x.grad, torch.full_like(out, 2.0 if value > 0 else 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"), [(5, 1, 1, 2), (3, 12, 2, 128), (9, 4, 4, 80), (2, 7, 1, 6), (0, 2, 1, 8)]
)
def test_rotary(backend: Backend, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, width: int) -> None:
    """The halves of cos and sin differ, queries and keys lie in one tensor."""
    angle = drawn(tokens, width, seed=1) * math.pi
    cos, sin = angle.cos(), angle.sin()

    def split(op: Callable[..., Any]) -> Callable[[Tensor], Any]:
        return lambda qk: op(*qk.split([heads, kv_heads], dim=1), cos.to(qk.dtype), sin.to(qk.dtype))

    def ours(qk: Tensor) -> Any:
        return apply_rotary(*qk.split([heads, kv_heads], dim=1), cos, sin, backend=backend)

    check(ours, split(reference.apply_rotary), [drawn(tokens, heads + kv_heads, width, dtype=dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (33, 128), (70, 80), (0, 16)])
def test_merged_attention_is_attention_over_all_keys(
    backend: Backend, dtype: torch.dtype, tokens: int, width: int
) -> None:
    heads, cut = 3, 4
    scores, values = 5 * drawn(heads, tokens, 11).double(), drawn(heads, 11, width, seed=1).double()

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        out = scores[..., keys].softmax(-1) @ values[:, keys]
        return out.transpose(0, 1).to(dtype), scores[..., keys].logsumexp(-1).float()

    whole, whole_lse = part(slice(None))
    out, lse = drawn(tokens + 2, heads, width, dtype=dtype), drawn(heads, tokens + 2)
    before = out.clone(), lse.clone()
    merge_attention(*part(slice(cut)), *part(slice(cut, None)), out[2:], lse[:, 2:], backend=backend)
    assert_near(out[2:], whole.double(), 3 * TOLERANCE[dtype])
    assert_near(lse[:, 2:], whole_lse.double(), 1e-6)
    assert torch.equal(out[:2], before[0][:2])
    assert torch.equal(lse[:, :2], before[1][:, :2])


def test_shapes_that_do_not_fit() -> None:
    x = drawn(2, 8)
    with pytest.raises(ValueError, match=r"residual torch.float32 \[2, 4\] does not fit"):
        rms_norm(x, drawn(8), 1e-6, drawn(2, 4))
    with pytest.raises(ValueError, match=r"weight or bias \[4\]"):
        layer_norm(x, drawn(8), drawn(4), 1e-6)
    with pytest.raises(ValueError, match=r"does not fit up torch\.float16"):
        swiglu(x, x.half())
    with pytest.raises(ValueError, match=r"cos \[2, 8\], sin \[2, 8\] do not fit"):
        apply_rotary(drawn(3, 1, 8), drawn(3, 1, 8), x, x)
    with pytest.raises(ValueError, match="D even"):
        apply_rotary(drawn(2, 1, 7), drawn(2, 1, 7), drawn(2, 7), drawn(2, 7))
    with pytest.raises(ValueError, match="do not fit: pass three"):
        merge_attention(drawn(2, 1, 8), drawn(1, 2), drawn(2, 1, 8), drawn(1, 2), drawn(2, 1, 8), drawn(2, 1))


def test_fake_tensors_have_the_real_ones_shapes_and_dtypes() -> None:
    """Of the operators, which a compiler and a count of bytes see."""

    def results() -> list[Tensor]:
        x = torch.ones(3, 4, 8, dtype=torch.float16, requires_grad=True)
        weight, angle = torch.ones(8, requires_grad=True), torch.ones(3, 8)
        y, total = layer_norm(x, weight, weight, 1e-6, x, backend="triton")
        normed, _ = rms_norm(y, weight, 1e-6, backend="triton")
        mixed = quick_gelu(swiglu(total, normed, backend="triton"), backend="triton")
        query, key = apply_rotary(mixed, mixed[:, :2], angle, angle, backend="triton")
        gradients = torch.autograd.grad(query.float().sum() + key.float().sum(), [x, weight])
        return [y, total, normed, mixed, query, key, *gradients]

    real = results()
    with FakeTensorMode():
        fake = results()
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
