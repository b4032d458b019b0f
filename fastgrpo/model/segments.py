"""Where sequences start that lie one behind the other: the layout of a variable-length attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """One variable-length attention: sequence i of the queries sees sequence i of the keys."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: Tensor
    """[n + 1] int32, where each query sequence starts, from 0."""
    cu_k: Tensor
    """[n + 1] int32, likewise for the keys."""
    tiles: tuple[int, ...]
    """How many consecutive sequences a backend without variable lengths pads together; they add up to n."""

    @classmethod
    def of(
        cls, q_lengths: Sequence[int], k_lengths: Sequence[int] | None = None, tiles: Sequence[int] | None = None
    ) -> "Segments":
        """Keys of the same lengths as the queries, and no padding, unless stated."""
        k_lengths = q_lengths if k_lengths is None else k_lengths
        tiles = [1] * len(q_lengths) if tiles is None else tiles
        assert sum(tiles) == len(q_lengths) == len(k_lengths)
        return cls(tuple(q_lengths), tuple(k_lengths), offsets(q_lengths), offsets(k_lengths), tuple(tiles))

    def to(self, device: torch.device) -> "Segments":
        """A copy whose tensors are on `device`."""
        return replace(self, cu_q=moved(self.cu_q, device), cu_k=moved(self.cu_k, device))

    @property
    def max_q(self) -> int:
        """The longest query sequence; 2 at least: flash attention takes 1 for a decode step, with no empty ones."""
        return max((2, *self.q_lengths))

    @property
    def max_k(self) -> int:
        """The longest key sequence."""
        return max(self.k_lengths, default=0)


def offsets(lengths: Sequence[int]) -> Tensor:
    """[n + 1] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory a copy waits
    return tensor.to(device, non_blocking=True)
