"""Products of few rows and the norm behind them: every way against float64, chains of early launches on a GPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgrpo_kernels import add_norm, reference, thin_gated_linear, thin_linear, thin_linear_parts
from fastgrpo_kernels.backend import Backend
from fastgrpo_kernels.thin_linear_kernels import Kind, launch_thin, ways
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter mis-computes bfloat16")
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, ON_GPU])]
BACKENDS: list[Backend] = ["torch", "triton"]
Product = Callable[..., Tensor]
"""(kind, x, weight, bias or nothing) → the product of that kind."""
KINDS: tuple[Kind, ...] = ("plain", "parts", "gated")


def drawn(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(kind: Kind, rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = drawn(columns * (2 if kind == "gated" else 1), width, seed=1) * width**-0.5
    bias = drawn(columns, dtype=dtype, seed=2) if kind == "plain" else None
    return drawn(rows, width, dtype=dtype), weight.to(dtype), bias


def plain_torch(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = F.linear(x, weight, bias)
    return reference.swiglu(*product.chunk(2, dim=-1)) if kind == "gated" else product


def assert_as_good(found: Tensor, kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """No further from float64 than torch in the inputs' dtype; [S, …] parts are summed."""
    exact = plain_torch(kind, x.double(), weight.double(), None if bias is None else bias.double())
    found = found.double().sum(0) if found.ndim == 3 else found
    ours, theirs = ((y.double() - exact).norm() for y in (found, plain_torch(kind, x, weight, bias)))
    assert ours <= 1.1 * theirs + 1e-6 * exact.norm(), (ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 40, 56), (3, 33, 520), (65, 70, 264), (128, 16, 128), (2, 5, 77), (0, 32, 64)]
)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in ways(kind)])
def test_every_way(kind: Kind, name: str, rows: int, columns: int, width: int, dtype: torch.dtype) -> None:
    """One row, two blocks of rows, columns and widths that no tile divides, none at all."""
    if name not in ways(kind, has_tma=width % 8 == 0):
        return
    x, weight, bias = inputs(kind, rows, columns, width, dtype)
    found = launch_thin(kind, x, weight, bias, ways(kind)[name])
    assert found.dtype == (torch.float32 if kind == "parts" else dtype)
    assert_as_good(found, kind, x, weight, bias)


def by_op(backend: Backend) -> Product:
    calls: dict[Kind, Callable[..., Tensor]] = {
        "plain": thin_linear,
        "parts": lambda x, weight, _, **rest: thin_linear_parts(x, weight, **rest),
        "gated": lambda x, weight, _, **rest: thin_gated_linear(x, weight, **rest),
    }
    return lambda kind, x, weight, bias=None: calls[kind](x, weight, bias, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ops(kind: Kind, backend: Backend, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(kind, 5, 24, 64, dtype)
    for given in (x, x.repeat(1, 2)[:, :64]):
        assert_as_good(by_op(backend)(kind, given, weight, bias), kind, x, weight, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize(("rows", "width", "parts"), [(1, 48, 0), (3, 129, 1), (5, 1536, 5), (0, 16, 2)])
def test_add_norm(backend: Backend, dtype: torch.dtype, rows: int, width: int, parts: int) -> None:
    hidden, weight = drawn(rows, width, dtype=dtype), drawn(width, dtype=dtype, seed=1)
    added = drawn(parts, rows, width, dtype=torch.float32, seed=2) if parts else None
    exact = hidden.double() + (0 if added is None else added.double().sum(0))
    y = add_norm(hidden, added, weight, 1e-6, backend=backend)
    torch.testing.assert_close(hidden, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)  # in place
    torch.testing.assert_close(y, reference.rms_norm(hidden, weight, 1e-6)[0])


def test_inputs_that_do_not_fit() -> None:
    x, weight = drawn(2, 8), drawn(4, 8)
    for call in (
        lambda: thin_linear(x, drawn(4, 9)),
        lambda: thin_linear(x, weight.float()),
        lambda: thin_linear(x, weight, drawn(3)),
        lambda: thin_gated_linear(x, weight[:3]),
        lambda: thin_linear(x.float(), weight.float(), backend="triton"),
        lambda: thin_linear_parts(drawn(129, 8), weight, backend="triton"),
        lambda: thin_linear(x, drawn(8, 4).T, backend="triton"),
        lambda: add_norm(x, drawn(1, 2, 8), weight[0], 1e-6),
        lambda: add_norm(drawn(8, 2).T, None, weight[0], 1e-6),
    ):
        with pytest.raises(ValueError, match=r"pass|in place"):
            call()


def layers(x: Tensor, weights: list[tuple[Tensor, ...]], multiply: Product, backend: Backend) -> list[Tensor]:
    """The products and norms of some layers, attention left out."""
    hidden, parts = x.clone(), None
    for norm, out, gate_up, down, bias in weights:
        y = add_norm(hidden, parts, norm, 1e-6, backend=backend)
        parts = multiply("parts", multiply("plain", y, out, bias), out)
        y = add_norm(hidden, parts, norm, 1e-6, backend=backend)
        parts = multiply("parts", multiply("gated", y, gate_up), down)
    assert parts is not None
    return [add_norm(hidden, parts, weights[0][0], 1e-6, backend=backend), hidden, parts]


def some_layers(count: int, hidden: int, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    def one(layer: int) -> tuple[Tensor, ...]:
        shapes = ((hidden, hidden), (6 * hidden, hidden), (hidden, 3 * hidden))
        weights = [drawn(*s, dtype=dtype, seed=9 * layer + i) * s[1] ** -0.5 for i, s in enumerate(shapes)]
        return (1 + drawn(hidden, dtype=dtype, seed=layer) / 8, *weights, drawn(hidden, dtype=dtype, seed=7 + layer))

    return [one(layer) for layer in range(count)]


def test_fake_tensors_have_the_real_ones_shapes_and_dtypes() -> None:
    x, weights = drawn(3, 16), some_layers(1, 16, torch.float16)
    real = layers(x, weights, by_op("triton"), "triton")
    with FakeTensorMode() as mode:
        x, weights = mode.from_tensor(x), [tuple(map(mode.from_tensor, layer)) for layer in weights]
        fake = layers(x, weights, by_op("triton"), "triton")
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="kernels follow one another on a GPU only")
@pytest.mark.parametrize("rows", [8, 64, 128])
def test_a_chain_of_early_launches_gives_the_same_bits_each_time(rows: int) -> None:
    """20 layers, replayed 50 times, by kernels of ours alone; and what plain torch computes."""

    def multiply(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return launch_thin(kind, x, weight, bias, list(ways(kind).values())[-1])

    x, weights = drawn(rows, 1536, dtype=torch.bfloat16), some_layers(20, 1536, torch.bfloat16)
    expected = layers(x, weights, by_op("torch"), "torch")[:2]
    layers(x, weights, multiply, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(x, weights, multiply, "triton")[:2]
    graph.replay()
    first = [y.clone() for y in found]
    for ours, theirs in zip(first, expected, strict=True):
        assert (ours - theirs).float().norm() <= 3e-2 * theirs.float().norm()
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(found, first, strict=True))
