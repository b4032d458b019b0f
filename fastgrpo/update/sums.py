"""Sums over an update's tokens, on the device, and their combination over micro-batches."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.types import SamplingMismatch

Sums = TypeVar("Sums", bound=tuple[Tensor, ...])


def sampling_mismatch(
    logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, ratio: Tensor | None = None, among: Tensor | None = None
) -> SamplingMismatch:
    """Compares [T] log-probs where `mask` [T] is true.

    Args:
        ratio: those that the loss is corrected by, with `among`, bool, saying which count; None: of every token.
    """
    difference = torch.where(mask, logprobs.detach() - sampling_logprobs, 0.0)
    ratio, among = (difference.exp(), mask) if ratio is None or among is None else (ratio, among)
    nothing = difference.new_full((1,), math.inf)
    return SamplingMismatch(
        mask.sum(),
        difference.abs().sum(),
        torch.cat([difference.abs(), difference.new_zeros(1)]).max(),
        among.sum(),
        torch.where(among, ratio, 0.0).sum(),
        torch.cat([torch.where(among, ratio, math.inf), nothing]).min(),
        torch.cat([torch.where(among, ratio, -math.inf), -nothing]).max(),
    )


def combine(parts: Sequence[Sums]) -> Sums:
    """Combines records: fields named …_min and …_max by minimum and maximum, all others by sum."""
    first = parts[0]
    names = getattr(first, "_fields")  # noqa: B009
    stacked = (torch.stack([part[i].float() for part in parts]) for i in range(len(names)))
    reduce = {"min": torch.amin, "max": torch.amax}
    return type(first)(
        *(
            reduce.get(name.rsplit("_", 1)[-1], torch.sum)(values, dim=0)
            for name, values in zip(names, stacked, strict=True)
        )
    )
