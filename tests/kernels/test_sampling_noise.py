"""The uniform numbers behind `sample`: their range, their distribution, and that neighbours have nothing in common."""

import math

import pytest
import torch
import triton
import triton.language as tl
from fastgrpo_kernels.reference.sampling import UNIT, row_keys, uniforms
from fastgrpo_kernels.sampling_scores import uniform
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = 1 << 20


def numbers(varying: str) -> Tensor:
    """[R, C]: neighbours in columns are neighbouring tokens; in rows, neighbouring seeds or counters."""
    axis, fixed = torch.arange(1024), torch.full((1024,), 17)
    seeds, counters = {"seeds": (axis, fixed), "counters": (fixed, axis), "both": (axis * 1000, axis)}[varying]
    return uniforms(seeds, counters, 1024)


@pytest.mark.parametrize("varying", ["seeds", "counters", "both"])
def test_uniform_in_the_open_interval(varying: str) -> None:
    u = numbers(varying).double()
    assert u.min() > 0
    assert u.max() < 1
    for power in range(1, 5):  # moments within 5 standard errors
        moment, spread = 1 / (power + 1), math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs((u**power).mean().item() - moment) < 5 * spread / math.sqrt(DRAWS)
    counts = torch.histc(u, bins=256, min=0, max=1)
    statistic = ((counts - DRAWS / 256) ** 2 / (DRAWS / 256)).sum().item()
    assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("varying", ["seeds", "counters", "both"])
def test_small_numbers_are_fine_enough_for_rare_tokens(varying: str) -> None:
    # The winner of a large vocabulary has a small number: there too they must be uniform, down to their last bits.
    u = numbers(varying).double().flatten()
    for edge in (2**-6, 2**-10):
        small = u[u < edge] / edge
        assert abs(len(small) - edge * DRAWS) < 5 * math.sqrt(edge * DRAWS)
        counts = torch.histc(small, bins=16, min=0, max=1)
        mean = len(small) / 16
        assert ((counts - mean) ** 2 / mean).sum().item() < 15 + 5 * math.sqrt(2 * 15)


@pytest.mark.parametrize("varying", ["seeds", "counters", "both"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (16, 0), (0, 256), (512, 0)])
def test_neighbours_are_independent(varying: str, rows: int, columns: int) -> None:
    u = numbers(varying)
    first, second = u[: 1024 - rows, : 1024 - columns], u[rows:, columns:]
    cells = (first * 16).long() * 16 + (second * 16).long()
    counts = torch.bincount(cells.flatten(), minlength=256).double()
    mean = cells.numel() / 256
    statistic = ((counts - mean) ** 2 / mean).sum().item()
    assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)


def test_every_row_has_a_mean_and_extremes_of_its_own() -> None:
    u = numbers("seeds").double()
    z = (u.mean(dim=1) - 0.5) * math.sqrt(12 * 1024)  # standard normal, one a row
    assert abs(z.mean().item()) < 5 / math.sqrt(1024)
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / 1024)
    assert len(u.argmin(dim=1).unique()) > 600  # 647 expected of 1024 fair picks


def test_the_largest_integer_stays_below_one() -> None:
    largest = (torch.tensor([2**31 - 1], dtype=torch.int32).float() + 0.5) * UNIT
    assert largest.item() < 1
    assert (torch.tensor([0.5]) * UNIT).item() > 0


@triton.jit
def _uniforms_kernel(low: tl.tensor, high: tl.tensor, output: tl.tensor, BLOCK: tl.constexpr) -> None:  # noqa: N803
    row = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    key_low = tl.load(low + row).to(tl.uint32, bitcast=True)
    key_high = tl.load(high + row).to(tl.uint32, bitcast=True)
    tl.store(output + row * BLOCK + token, uniform(token, key_low, key_high))


def test_the_kernel_makes_the_same_numbers_bit_for_bit() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789], device=DEVICE)
    counters = torch.tensor([0, 5, 1, 0, 7, 1023], device=DEVICE)
    output = torch.empty(len(seeds), 2048, device=DEVICE)
    _uniforms_kernel[(len(seeds),)](*row_keys(seeds, counters), output, BLOCK=2048)
    assert torch.equal(output, uniforms(seeds, counters, 2048))
