"""Start offsets of concatenated sequences: the layout of a variable-length attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """One variable-length attention: query sequence i attends to key sequence i."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: Tensor
    """[n + 1] int32, where each query sequence starts, from 0."""
    cu_k: Tensor
    """[n + 1] int32, likewise for the keys."""
    tiles: tuple[int, ...]
    """Counts of consecutive sequences that a backend without variable lengths pads together; their sum is n."""
    window: int | None = None
    """Keys that a causal query sees, itself included; the last query of a sequence is at its last key. None: all."""
    softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap) before the softmax (Gemma 2); None: they stay."""
    ahead: Tensor | None = None
    """[Tq] int64, keys after its own that a causal query sees: the rest of its picture (Gemma 3); None: none. Every
    sequence is then its own tile."""

    @classmethod
    def of(
        cls,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int] | None = None,
        tiles: Sequence[int] | None = None,
        window: int | None = None,
    ) -> "Segments":
        """By default, keys have the queries' lengths and every sequence is its own tile."""
        k_lengths = q_lengths if k_lengths is None else k_lengths
        tiles = [1] * len(q_lengths) if tiles is None else tiles
        assert sum(tiles) == len(q_lengths) == len(k_lengths)
        return cls(tuple(q_lengths), tuple(k_lengths), offsets(q_lengths), offsets(k_lengths), tuple(tiles), window)

    def to(self, device: torch.device) -> "Segments":
        """A copy whose tensors are on `device`."""
        return replace(self, cu_q=moved(self.cu_q, device), cu_k=moved(self.cu_k, device))

    @property
    def max_q(self) -> int:
        """The longest query sequence, at least 2: flash attention takes 1 for a decode step without empty sequences."""
        return max((2, *self.q_lengths))

    @property
    def max_k(self) -> int:
        """The longest key sequence."""
        return max(self.k_lengths, default=0)


def rest_of_run(marked: Tensor) -> Tensor:
    """[T] bool → [T] int64: how many tokens follow each marked one in its run of marked ones; 0 for others."""
    at = torch.arange(len(marked), device=marked.device)
    ends = torch.where(marked, len(marked), at).flip(0).cummin(0).values.flip(0)
    return (ends - at - 1).clamp(min=0)


def offsets(lengths: Sequence[int]) -> Tensor:
    """[n + 1] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to `device` without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory would wait
    return tensor.to(device, non_blocking=True)
