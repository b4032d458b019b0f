"""Whether tokens were drawn from a distribution."""

import math

import torch
from torch import Tensor


def chi_square_bound(degrees: int) -> float:
    """Exceeded once in a million (Wilson and Hilferty's approximation, z = 4.75)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_drawn_from(tokens: Tensor, probs: Tensor) -> None:
    """Chi-square of the drawn tokens, those expected fewer than 5 times taken together."""
    expected = probs * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probs)).double()
    assert (observed[probs == 0] == 0).all(), "a token without probability was drawn"
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    kept = expected > 1
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9))[kept].sum().item()
    assert statistic < chi_square_bound(int(kept.sum()) - 1), statistic
