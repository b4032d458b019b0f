"""What the sampler asks of a decoder, and the paged cache of keys and values that every decoder fills.

`PackedDecoder` holds weights of its own, packed; `GenericDecoder` runs the model's own transformers layers.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from fastgrpo_kernels import PagedLayout
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a decoder that its cache and the decode buffers depend on."""

    layers: int
    """Attention layers."""
    kv_heads: int
    head_dim: int
    vocabulary: int
    state_sizes: tuple[tuple[int, ...], ...] = ()
    """Of a row's states in layers of linear attention: the convolution's and the recurrent one, layer after layer."""


class KVCache(NamedTuple):
    """Paged keys and values of all attention layers, and the state of every row in those of linear attention."""

    keys: list[Tensor]
    """Per layer, [pages, page_size, Hkv, D]."""
    values: list[Tensor]
    """Same shapes."""
    states: tuple[Tensor, ...] = ()
    """[R, …], as many as the shape has `state_sizes`."""

    @classmethod
    def empty(
        cls, shape: CacheShape, pages: int, page_size: int, dtype: torch.dtype, device: Any, rows: int = 0
    ) -> "KVCache":
        """An uninitialised cache."""
        size = (pages, page_size, shape.kv_heads, shape.head_dim)
        keys, values = ([torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)] for _ in range(2))
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            keys, values, tuple(torch.zeros(rows, *size, dtype=wide, device=device) for size in shape.state_sizes)
        )

    @staticmethod
    def state_bytes(shape: CacheShape) -> int:
        """Bytes that a row's states take."""
        return 4 * sum(math.prod(size) for size in shape.state_sizes)

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
