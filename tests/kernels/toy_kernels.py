"""Kernels for the test of `bench/aot.py`: sound ones. Compiled, never run."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from fastgrpo_kernels.tl_utils import launch
from torch import Tensor


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """The sound kernel in half precision and in IEEE float32, which no tensor core computes."""
    yield "fp16", lambda: square(_meta(64, torch.float16), "tf32")
    yield "fp32", lambda: square(_meta(32, torch.float32), "ieee")


def _meta(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, size, dtype=dtype, device="meta")


def square(matrix: Tensor, precision: str) -> None:
    """matrix @ matrix, written over it; one tile."""
    launch(square_kernel, (1,), matrix, SIZE=matrix.shape[0], PRECISION=precision, num_warps=4)


@triton.jit
def square_kernel(matrix, SIZE: tl.constexpr, PRECISION: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(matrix + at)
    product = tl.dot(tile, tile, input_precision=PRECISION)
    tl.store(matrix + at, product.to(tile.dtype))
