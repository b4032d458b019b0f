"""Every way in which `linear_logprob` may make its logits, whichever is fastest here; its gradients' products."""

from itertools import product

import pytest
import torch
from fastgrpo_kernels.linear_logprob_gemm import (
    POINTERS,
    TileBuffers,
    launch_logits,
    logits_tile,
    multiply,
    tile_buffers,
    ways,
)
from fastgrpo_kernels.linear_logprob_passes import fits
from fastgrpo_kernels.linear_logprob_pick import pick_way
from fastgrpo_kernels.tl_utils import target_arch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ["pointers", "tma", "tma_in_turn", "tma_halves"]
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TEMPERATURE = 0.7
ROUNDING = 2e-4 if DEVICE == "cuda" else 2e-5
"""Of sums in float32; tensor cores round more coarsely."""


def inputs(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(DEVICE).manual_seed(rows + vocabulary)
    hidden, weight = (torch.randn(n, width, generator=draw, device=DEVICE) for n in (rows, vocabulary))
    return hidden.to(dtype), (3 * width**-0.5 * weight).to(dtype)


def exact(hidden: Tensor, weight: Tensor) -> TileBuffers:
    """In float64."""
    columns = logits_tile(hidden.dtype).columns
    z = hidden.double() @ weight.double().T / TEMPERATURE
    z = torch.nn.functional.pad(z, (0, -len(weight) % columns), value=-torch.inf).unflatten(1, (-1, columns))
    top = z.amax(-1)
    shifted = z - top[..., None]
    e = shifted.exp()
    weighted = (e * shifted.clamp(min=-1e4)).sum(-1) / torch.tensor(2.0).log()
    return TileBuffers(top, e.sum(-1), weighted, e.flatten(1))


def assert_right(found: TileBuffers, truth: TileBuffers, count: int) -> None:
    for name, ours, theirs in zip(TileBuffers._fields, found, truth, strict=True):
        if ours is not None and theirs is not None:
            tolerance = torch.finfo(ours.dtype).eps if name == "exponentials" else ROUNDING
            ours, theirs = ours[:count].double(), theirs[:count]
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=f"{name} is wrong")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("rows", "count", "vocabulary", "width", "entropy", "keep"),
    [
        (1, 1, 300, 96, True, True),
        (300, 260, 1021, 72, False, True),
        (257, 257, 513, 128, True, False),
        (129, 0, 300, 96, True, True),
    ],
)
def test_every_way_gives_the_statistics(
    name: str, rows: int, count: int, vocabulary: int, width: int, entropy: bool, keep: bool, dtype: torch.dtype
) -> None:
    hidden, weight = inputs(rows, vocabulary, width, dtype)
    if name not in ways(hidden, weight):
        pytest.skip(f"{name} is not for sm_{target_arch()}")
    buffers = tile_buffers(hidden, rows, vocabulary, entropy, keep)
    live = torch.tensor([count], device=DEVICE)
    launch_logits(hidden, weight, live, buffers, TEMPERATURE, ways(hidden, weight)[name])
    assert_right(buffers, exact(hidden, weight), count)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_at_a_models_width(name: str, keep: bool) -> None:
    """Many tiles for each program; a last tile that is half vocabulary; the last row block half empty."""
    hidden, weight = inputs(2500, 16_384 + 128, 1536, torch.bfloat16)
    if name not in ways(hidden, weight):
        pytest.skip(f"{name} is not for sm_{target_arch()}")
    buffers = tile_buffers(hidden, len(hidden), len(weight), True, keep)
    live = torch.tensor([2400], device=DEVICE)
    launch_logits(hidden, weight, live, buffers, TEMPERATURE, ways(hidden, weight)[name])
    assert_right(buffers, exact(hidden, weight), 2400)


@pytest.mark.gpu
def test_the_way_is_picked_among_them() -> None:
    hidden, weight = inputs(2500, 16_384 + 128, 1536, torch.bfloat16)
    buffers = tile_buffers(hidden, len(hidden), len(weight), False, True)
    assert pick_way(hidden, weight, torch.tensor([2400], device=DEVICE), buffers) in ways(hidden, weight)


def test_what_the_accelerator_cannot_load_goes_by_pointers() -> None:
    """Rows that are no multiple of 16 bytes, float32, and a weight that lies askew in a larger buffer."""
    flat = torch.zeros(301 * 96, dtype=torch.float16, device=DEVICE)
    hidden = flat[: 9 * 96].view(9, 96)
    for weight in (flat[1:].as_strided((300, 96), (96, 1), 1), hidden.new_empty(300, 100)):
        assert list(ways(hidden.new_empty(9, weight.shape[1]), weight)) == [POINTERS]
    assert list(ways(hidden.float(), hidden.float())) == [POINTERS]


def test_products_keep_float32() -> None:
    a, b = inputs(5, 7, 96, torch.float16)
    out = torch.empty(5, 7, device=DEVICE)
    multiply(a, b.T, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [*product((torch.bfloat16, torch.float16), (None, torch.float32)), (torch.float32, None)]
)
def test_products_exist_on_cuda(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """With the operands that the backward pass has: part of a wider buffer, and its transpose."""
    chosen = out_dtype or dtype
    with FakeTensorMode():
        dlogits = torch.empty_strided((9, 300), (512, 1), dtype=dtype, device="cuda")
        transposed = torch.empty_strided((300, 9), (1, 512), dtype=dtype, device="cuda")
        x, weight = (torch.empty(n, 96, dtype=dtype, device="cuda") for n in (9, 300))
        dhidden = torch.empty(9, 96, dtype=torch.float32, device="cuda")
        dweight = torch.empty(300, 96, dtype=chosen, device="cuda")
        assert multiply(dlogits, weight, dhidden).shape == (9, 96)
        assert multiply(transposed, x, dweight).dtype == chosen


def test_what_is_kept_counts_rows_that_take_part() -> None:
    hidden, targets = torch.empty(64, 8, dtype=torch.float16), torch.empty(10, dtype=torch.int64)
    columns = logits_tile(torch.float16).columns
    whole = 10 * 4 * columns * 2
    assert fits(hidden, targets, 4 * columns, whole)
    assert fits(hidden, targets, 3 * columns + 1, whole)
    assert not fits(hidden, targets, 4 * columns + 1, whole)
