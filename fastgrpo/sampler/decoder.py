"""What the sampler asks of a decoder, and the paged cache of keys and values that every decoder fills.

`PackedDecoder` holds weights of its own, packed; `GenericDecoder` runs the model's own transformers layers.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from fastgrpo_kernels import PagedLayout
from torch import Tensor


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a decoder that its cache and the decode buffers depend on."""

    layers: int
    """Attention layers."""
    kv_heads: int
    head_dim: int
    vocabulary: int


class KVCache(NamedTuple):
    """Paged keys and values of all layers."""

    keys: list[Tensor]
    """Per layer, [pages, page_size, Hkv, D]."""
    values: list[Tensor]
    """Same shapes."""

    @classmethod
    def empty(cls, shape: CacheShape, pages: int, page_size: int, dtype: torch.dtype, device: Any) -> "KVCache":
        """An uninitialised cache."""
        size = (pages, page_size, shape.kv_heads, shape.head_dim)
        return cls(*([torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)] for _ in range(2)))

    @staticmethod
    def page_bytes(shape: CacheShape, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes in all layers."""
        return 2 * shape.layers * page_size * shape.kv_heads * shape.head_dim * dtype.itemsize


class Decoder(Protocol):
    """One new token per row, from a paged cache, with nothing read on the host, so that a CUDA graph can hold it."""

    shape: Any
    """A `CacheShape`."""
    dtype: torch.dtype
    device: torch.device

    def running(self) -> AbstractContextManager[None]:
        """Encloses calls of `decode`, captures of them and prefills."""
        ...

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, layout: PagedLayout, cache: KVCache) -> Tensor:
        """Logits [B, V] after one more token per row.

        Args:
            tokens: [B] int64.
            positions: [B] int64; past the prompt the three axes of M-RoPE agree.
            slots: [B] int64, where the token's key and value go; −1: nowhere.
            layout: pages that each row reads, the new token's included.
        """
        ...
