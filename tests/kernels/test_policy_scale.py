"""Factors of the surrogate against loops over sequences and their counted tokens."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from fastgrpo_kernels import ImportanceCorrection, VespoParams, importance_ratio, off_policy_mask, vespo_weights
from torch import Tensor

LENGTHS = [4, 0, 1, 6, 3]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
ADVANTAGES = torch.tensor([1.0, -1.0, -0.5, -2.0, 0.0])


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Two log-probs [T] and a mask; masked-out tokens hold NaN."""
    generator = torch.Generator().manual_seed(0)
    one, other = (-torch.rand(sum(LENGTHS), generator=generator) for _ in range(2))
    mask = torch.rand(sum(LENGTHS), generator=generator) < 0.8
    return one.masked_fill(~mask, math.nan), other, mask


def by_sequence(values: Tensor, mask: Tensor) -> list[list[float]]:
    return [values[a:b][mask[a:b]].tolist() for a, b in pairwise(CU_SEQLENS.tolist())]


@pytest.mark.parametrize(("low", "high"), [(None, 1.1), (0.9, None), (0.9, 1.1), (None, None)])
@pytest.mark.parametrize("outside", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_ratio(level: Any, outside: Any, low: float | None, high: float | None) -> None:
    if outside == "truncate" and low is high is None:
        return
    old, sampling, mask = draw()
    sums = by_sequence(old - sampling, mask)
    logs = [math.fsum(one) for one in sums] if level == "sequence" else [value for one in sums for value in one]
    expected = [math.exp(value) for value in logs]
    floor, ceiling = low or -math.inf, high or math.inf
    if outside == "truncate":
        expected = [min(max(value, floor), ceiling) for value in expected]
    else:
        expected = [value if floor <= value <= ceiling else 0.0 for value in expected]
    found = importance_ratio(old, sampling, CU_SEQLENS, mask, ImportanceCorrection(level, outside, low, high))
    assert (found if level == "sequence" else found[mask]).tolist() == pytest.approx(expected, rel=1e-5)
    assert found.isfinite().all()


def test_off_policy_mask_drops_bad_sequences_that_drifted() -> None:
    logprobs, drawn, mask = draw()
    gaps = [math.fsum(gap) / max(1, len(gap)) for gap in by_sequence(drawn - logprobs, mask)]
    threshold = sorted(gaps)[1]
    kept = off_policy_mask(logprobs, drawn, ADVANTAGES, CU_SEQLENS, mask, threshold + 1e-6)
    assert kept.tolist() == [
        a >= 0 or gap <= threshold + 1e-6 for a, gap in zip(ADVANTAGES.tolist(), gaps, strict=True)
    ]
    assert len(set(kept.tolist())) == 2


@pytest.mark.parametrize("corrected", [False, True])
def test_vespo_weights(corrected: bool) -> None:
    logprobs, old, mask = draw()
    ratio = torch.linspace(0, 2, len(mask)) if corrected else None  # 0: a masked token
    params = VespoParams(k_pos=1.5, lambda_pos=2.5, k_neg=3.0, lambda_neg=2.0)
    ratios_of = by_sequence(torch.ones(len(mask)) if ratio is None else ratio, mask)
    expected = []
    for s, (gaps, ratios) in enumerate(zip(by_sequence(logprobs - old, mask), ratios_of, strict=True)):
        log_w = math.fsum(gaps) + math.fsum(math.log(max(r, 1e-8)) for r in ratios)
        w = math.exp(min(max(log_w, math.log(1e-8)), 20))
        k, decay = (1.5, 2.5) if ADVANTAGES[s] >= 0 else (3.0, 2.0)
        expected.append(math.exp(decay) * w**k * math.exp(-decay * w))
    found = vespo_weights(logprobs, old, ADVANTAGES, CU_SEQLENS, mask, params, ratio)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-30)
    assert found[1] == pytest.approx(1.0, abs=1e-6), "on policy the weight is 1"


def test_extreme_ratios_give_finite_weights() -> None:
    far = torch.tensor([-1e4, 0.0])
    for logprobs, old in ((far, -far), (-far, far)):
        offsets = torch.tensor([0, 1, 2])
        found = vespo_weights(logprobs, old, torch.ones(2), offsets, torch.ones(2, dtype=torch.bool), VespoParams())
        assert found.isfinite().all()
        assert found[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outside": "drop"}, "outside='drop' is not valid: use truncate or mask"),
        ({"level": "word"}, "level='word'"),
        ({"outside": "truncate", "high": None}, "high=None is not valid"),
        ({"low": 4.0}, "low=4.0 is not valid: use a number below high=3.0"),
    ],
)
def test_mistakes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportanceCorrection(**settings)
