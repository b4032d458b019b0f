"""Packed sequences: from tokens to sequences and back."""

import torch
from torch import Tensor


class Segments:
    """Sums and means over the masked-in tokens of each sequence."""

    def __init__(self, cu_seqlens: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        lengths = cu_seqlens.diff().to(mask.device)
        indices = torch.arange(len(lengths), device=mask.device)
        self.owner = indices.repeat_interleave(lengths, output_size=len(mask))  # [T]
        self.mask = mask.to(dtype)
        self.counts = self._sum(self.mask, len(lengths))  # [N]

    def mean(self, values: Tensor) -> Tensor:
        """[T] to [N]; 0 for a sequence without masked-in tokens."""
        return self.sum(values) / self.counts.clamp(min=1)

    def sum(self, values: Tensor) -> Tensor:
        """[T] to [N]."""
        return self._sum(values * self.mask, len(self.counts))

    def spread(self, values: Tensor) -> Tensor:
        """[N] to [T]: each token gets its sequence's value."""
        return values[self.owner]

    def _sum(self, values: Tensor, count: int) -> Tensor:
        return values.new_zeros(count).index_add(0, self.owner, values)
