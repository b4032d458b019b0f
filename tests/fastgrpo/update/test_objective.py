"""Token weights against TRL's aggregations written over a padded batch, and the loss of a config."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastgrpo_kernels import LossParams
from torch import Tensor

from fastgrpo.config import LOSS_TYPES
from fastgrpo.update.objective import loss_params, sequence_weights

MAX_LENGTH = 12
MICRO = 3  # completions per micro-batch
RANKS = [[5, 0, 12, 1, 7, 3], [2, 2, 0, 0, 0, 9]]  # token counts of each rank's completions
SIZES = [length for rank in RANKS for length in rank]


def weights_of(loss_type: str, counts: list[int]) -> Tensor:
    return sequence_weights(
        torch.tensor(counts),
        loss_type,
        max_completion_length=MAX_LENGTH,
        total_sequences=len(SIZES),
        total_tokens=sum(SIZES),
        micro_batch_size=MICRO,
        total_micro_batches=len(SIZES) // MICRO,
    )


def padded_loss(loss_type: str, losses: Tensor, mask: Tensor) -> Tensor:
    """One micro-batch's loss [B, L], aggregated as TRL does, before the mean over micro-batches and ranks."""
    if loss_type in ("grpo", "sapo"):
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return (losses * mask).sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return (losses * mask).sum() / (len(losses) * MAX_LENGTH)
    if loss_type in ("dapo", "cispo", "vespo"):
        return (losses * mask).sum() / (sum(SIZES) / (len(SIZES) // MICRO))
    assert loss_type == "luspo"
    return (losses * mask).sum(1).mean()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_add_up_to_the_mean_over_micro_batches_and_ranks(loss_type: str) -> None:
    torch.manual_seed(0)
    losses = torch.randn(len(SIZES), MAX_LENGTH)
    mask = (torch.arange(MAX_LENGTH) < torch.tensor(SIZES)[:, None]).float()
    pieces = [padded_loss(loss_type, x, m) for x, m in zip(losses.split(MICRO), mask.split(MICRO), strict=True)]
    weights = torch.cat([weights_of(loss_type, counts) for counts in RANKS])
    assert weights.dtype == torch.float32
    torch.testing.assert_close((weights[:, None] * losses * mask).sum(), torch.stack(pieces).mean())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_counted_tokens_has_finite_weights(loss_type: str) -> None:
    weights = sequence_weights(
        torch.zeros(4, dtype=torch.long),
        loss_type,
        max_completion_length=MAX_LENGTH,
        total_sequences=4,
        total_tokens=0,
        micro_batch_size=2,
        total_micro_batches=2,
    )
    assert weights.isfinite().all()
    assert (weights <= 1).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_completions_at_all(loss_type: str) -> None:
    weights = sequence_weights(
        torch.zeros(0, dtype=torch.long),
        loss_type,
        max_completion_length=MAX_LENGTH,
        total_sequences=0,
        total_tokens=0,
        micro_batch_size=2,
        total_micro_batches=0,
    )
    assert weights.shape == (0,)


def test_bnpo_keeps_its_logical_micro_batches_and_a_ragged_last_one() -> None:
    weights = sequence_weights(
        torch.tensor([1, 3, 6, 2, 5]),
        "bnpo",
        max_completion_length=8,
        total_sequences=5,
        total_tokens=17,
        micro_batch_size=2,
        total_micro_batches=3,
    )
    torch.testing.assert_close(weights, torch.tensor([1 / 12, 1 / 12, 1 / 24, 1 / 24, 1 / 15]))


def test_totals_may_be_tensors_reduced_over_ranks() -> None:
    weights = sequence_weights(
        torch.tensor([1, 3]),
        "dapo",
        max_completion_length=8,
        total_sequences=2,
        total_tokens=torch.tensor(8),
        micro_batch_size=2,
        total_micro_batches=1,
    )
    torch.testing.assert_close(weights, torch.full((2,), 1 / 8))


def test_an_unknown_loss_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_type='ppo'.*grpo, bnpo"):
        weights_of("ppo", [1])
    with pytest.raises(ValueError, match=r"loss_type='ppo'.*grpo, bnpo"):
        loss_params(config(loss_type="ppo"))


def config(**changes: Any) -> Any:
    settings = {
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "beta": 0.0,
        "importance_sampling_level": "token",
        "use_bias_correction_kl": True,
        "sapo_temperature_neg": 1.05,
        "sapo_temperature_pos": 1.0,
    }
    return SimpleNamespace(**{**settings, **changes})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_type_has_its_surrogate(loss_type: str) -> None:
    surrogate = {"cispo": "cispo", "sapo": "sapo", "vespo": "reinforce"}.get(loss_type, "clipped")
    assert loss_params(config(loss_type=loss_type)) == LossParams(surrogate=surrogate, kl_bias_correction=True)  # type: ignore[arg-type]


def test_every_setting_reaches_the_loss() -> None:
    params = loss_params(
        config(
            loss_type="sapo",
            epsilon=0.1,
            epsilon_high=0.3,
            delta=4.0,
            beta=0.04,
            importance_sampling_level="sequence",
            use_bias_correction_kl=False,
            sapo_temperature_neg=1.2,
            sapo_temperature_pos=1.1,
        )
    )
    assert params == LossParams(
        surrogate="sapo",
        level="sequence",
        epsilon_low=0.1,
        epsilon_high=0.3,
        delta=4.0,
        beta=0.04,
        kl_bias_correction=False,
        sapo_temperature_pos=1.1,
        sapo_temperature_neg=1.2,
    )


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_level='word'.*token or sequence"):
        loss_params(config(importance_sampling_level="word"))
    with pytest.raises(ValueError, match="delta"):
        loss_params(config(delta=-1.0))
