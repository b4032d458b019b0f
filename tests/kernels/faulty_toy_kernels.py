"""Kernels for the test of `bench/aot.py`, one for each fault it must find. Compiled, never run."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from fastgrpo_kernels.tl_utils import launch


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """One case a kernel."""
    single, half = torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.float16)
    yield "spilling", lambda: launch(spilling_kernel, (1,), single, SIZE=8192, num_warps=1)
    yield "too much shared memory", lambda: launch(greedy_kernel, (1,), half, M=128, K=512, num_warps=16)
    yield "broken", lambda: launch(broken_kernel, (1,), single, num_warps=4)


@triton.jit
def spilling_kernel(values, SIZE: tl.constexpr):  # noqa: N803
    block = tl.load(values + tl.arange(0, SIZE))
    tl.store(values + tl.arange(0, SIZE), block / tl.sum(block))


@triton.jit
def greedy_kernel(values, M: tl.constexpr, K: tl.constexpr):  # noqa: N803
    rows, depth = tl.arange(0, M), tl.arange(0, K)
    left, right = tl.load(values + rows[:, None] * K + depth), tl.load(values + depth[:, None] * M + rows)
    tl.store(values + rows[:, None] * M + rows, tl.dot(left, right).to(tl.float16))


@triton.jit
def broken_kernel(values):
    tl.store(values + tl.arange(0, 3), 0.0)
