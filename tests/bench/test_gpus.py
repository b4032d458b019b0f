"""How launches fill a GPU, against numbers worked out by hand."""

import math

import pytest
from gpus import GPUS, filling, floor_seconds

H100 = GPUS[90]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "resident"),
    [
        (4, 64, 0, 8),  # 2,048 registers a warp: 32 warps
        (4, 65, 0, 7),  # 72 a thread: 28 warps
        (1, 16, 0, 32),  # no more blocks than that
        (16, 32, 0, 4),  # 64 warps at most
        (4, 32, 100 << 10, 2),  # and 1 KiB of the system's for each
        (8, 255, 227 << 10, 1),
    ],
)
def test_what_runs_at_once(warps: int, registers: int, shared: int, resident: int) -> None:
    found = filling(H100, 132 * resident, warps, registers, shared)
    assert found == (resident * warps / 64, 1.0, 0.0)


def test_the_tail_is_the_empty_share_of_all_waves() -> None:
    assert filling(H100, 132 * 8 * 3 // 2, 4, 64, 0)[1:] == (1.5, 0.25)
    assert filling(H100, 132, 4, 64, 0)[1:] == (0.125, 0.875)


def test_a_block_that_does_not_fit_fills_nothing() -> None:
    assert filling(GPUS[120], 100, 8, 32, 100 << 10) == (0.0, math.inf, 0.0)
    assert filling(GPUS[120], 170, 8, 32, GPUS[120].block_shared).waves == 1.0


def test_the_floor_is_the_longer_of_products_and_memory() -> None:
    assert floor_seconds(798e12, 0.0) == floor_seconds(0.0, 3e12) == 1.0
    assert floor_seconds(798e12, 6e12) == 2.0
