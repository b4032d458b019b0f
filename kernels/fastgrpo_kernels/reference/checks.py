"""What every op checks of its inputs, in every implementation of it."""

import math

import torch
from torch import Tensor

from fastgrpo_kernels.types import check_option


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half precision, the tensor's own for float32 and float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def shape_of(tensor: Tensor) -> list[int]:
    """For messages."""
    return list(tensor.shape)


def check_temperature(temperature: float) -> None:
    """Raises a ValueError unless finite and positive."""
    check_option("temperature", temperature, 0 < temperature < math.inf, "a finite number above 0")


def check_range(name: str, indices: Tensor, size: int, ignore_index: int | None = None) -> None:
    """Raises a ValueError that names the first index outside 0..size−1; on CPU only, since it reads values."""
    if indices.device.type != "cpu":
        return
    wrong = (indices < 0) | (indices >= size)
    if ignore_index is not None:
        wrong &= indices != ignore_index
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{position}]={int(indices[position])} is outside 0..{size - 1}.")


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    """Raises a ValueError unless both are contiguous and of one shape [pages, page_size, Hkv, D]."""
    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape:
        raise ValueError(
            f"key_cache {shape_of(key_cache)}, value_cache {shape_of(value_cache)} do not fit: "
            "pass twice [pages, page_size, Hkv, D]."
        )
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("key_cache and value_cache must be contiguous: allocate one tensor per layer, or layer first.")
