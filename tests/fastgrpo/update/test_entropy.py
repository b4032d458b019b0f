"""The entropy bonus, its adaptive coefficient and the filter for high-entropy tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from fastgrpo_kernels import LossMetrics
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.types import Completion, ObjectiveTerms, Prompt, TrainingGroup, Updater, UpdateResult
from fastgrpo.update.entropy import EntropyControl

ENTROPIES = [[0.1, 0.9, 0.5], [0.7], [0.2, 0.3], [0.8, 0.4]]
"""Of 2 groups of 2 completions."""
MASKS = [[1, 1, 1], [1], [1, 0], [1, 1]]


class Ranks:
    """This rank, and another that brings `other` entropies and `sums`."""

    device = torch.device("cpu")

    def __init__(self, count: int = 1, other: list[float] | None = None, sums: Any = 0.0) -> None:
        self.num_processes = count
        self.other = torch.tensor(other or [])
        self.sums = sums

    def pad_across_processes(self, values: Tensor, pad_index: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, max(0, len(self.other) - len(values))), value=pad_index)

    def gather(self, values: Tensor) -> Tensor:
        filled = torch.full((len(values) - len(self.other),), -1.0) if self.num_processes > 1 else torch.zeros(0)
        return torch.cat([values, self.other, filled])

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return values + torch.as_tensor(self.sums if len(values.shape) else 0.0)


def groups() -> list[TrainingGroup]:
    made = []
    for g in range(2):
        ids = torch.arange(2)
        masks = tuple(torch.tensor(mask).bool() for mask in MASKS[2 * g : 2 * g + 2])
        drawn = [torch.zeros(len(mask)) for mask in masks]
        completions = tuple(Completion(g, i, d.long(), "", "stop", d, d) for i, d in enumerate(drawn))
        prompt = Prompt(g, ids, ids.expand(3, -1), None, None, "")
        made.append(TrainingGroup(prompt, completions, torch.ones(2), tuple(drawn), masks))
    return made


UPDATER = cast(
    Updater,
    SimpleNamespace(
        entropies=lambda given: [
            tuple(torch.tensor(one) for one in ENTROPIES[2 * g.prompt.row_id : 2 * g.prompt.row_id + 2]) for g in given
        ]
    ),
)


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def build(ranks: Ranks | None = None, **settings: Any) -> EntropyControl:
        base = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "num_generations": 2}
        config = GRPOConfig(**{**base, "per_device_train_batch_size": 4, **settings})
        return EntropyControl(config, cast(Accelerator, ranks or Ranks()))

    return build


def result(loss: float, entropy_sum: float, tokens: float, bonus: float = 0.0) -> UpdateResult:
    metrics = LossMetrics(*torch.zeros(9).unbind())._replace(
        entropy_sum=torch.tensor(entropy_sum), token_count=torch.tensor(tokens)
    )
    terms = ObjectiveTerms(torch.zeros(()), torch.zeros(()), torch.tensor(bonus), torch.zeros(()))
    return UpdateResult(torch.tensor(loss), metrics, cast(Any, None), terms)


def flat(pieces: list[Any]) -> list[float]:
    return torch.cat([piece for own in pieces for piece in own]).tolist()


def test_without_settings_nothing_is_touched(make: Any) -> None:
    control, given = make(), groups()
    assert control.prepare(given, UPDATER) == given
    assert control.finish(result(1.0, 3.0, 7.0)) == {}


def test_the_bonus_is_the_mean_over_each_micro_batch(make: Any) -> None:
    control = make(entropy_coef=0.5, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    weights = flat([group.entropy_weights for group in control.prepare(groups(), UPDATER, 2)])
    # two micro-batches of 4 and 3 counted tokens
    assert weights == pytest.approx([0.5 / 8] * 4 + [0.5 / 6, 0, 0.5 / 6, 0.5 / 6])
    assert control.finish(result(1.0, 3.0, 7.0, bonus=0.25)) == {"policy_loss": 1.25, "entropy_coef": 0.5}


def test_ranks_share_the_bonus(make: Any) -> None:
    control = make(Ranks(2), entropy_coef=1.0)
    weights = flat([group.entropy_weights for group in control.prepare(groups(), UPDATER)])
    assert weights == pytest.approx([1 / 14] * 4 + [1 / 14, 0, 1 / 14, 1 / 14])


def test_the_filter_keeps_the_share_of_highest_entropy(make: Any) -> None:
    control = make(top_entropy_quantile=0.5)
    scales = flat([group.policy_scale for group in control.prepare(groups(), UPDATER)])
    # the median of the counted .1 .9 .5 .7 .2 .8 .4 is .5; .3 is masked out, whatever its scale
    assert scales == [0, 1, 1, 1, 0, 0, 1, 0]


def test_the_filter_s_threshold_is_that_of_all_ranks(make: Any) -> None:
    control = make(Ranks(2, other=[0.95] * 7), top_entropy_quantile=0.5)
    scales = flat([group.policy_scale for group in control.prepare(groups(), UPDATER)])
    assert scales == [0, 0, 0, 0, 0, 0, 0, 0]  # the median is between .9 and .95
    control = make(Ranks(2, other=[0.0]), top_entropy_quantile=0.5)
    assert control.prepare([], UPDATER) == [], "a rank without groups still takes part"


def test_with_the_filter_the_bonus_is_over_what_it_keeps(make: Any) -> None:
    control = make(top_entropy_quantile=0.5, entropy_coef=1.0)
    weights = flat([group.entropy_weights for group in control.prepare(groups(), UPDATER)])
    assert weights == pytest.approx([0, 0.25, 0.25, 0.25, 0, 0, 0.25, 0])


def test_the_coefficient_follows_the_target(make: Any) -> None:
    settings = {"entropy_target": 0.5, "entropy_coef_delta": 0.1, "entropy_coef_min": 0.05, "entropy_coef_max": 0.25}
    control = make(use_adaptive_entropy=True, entropy_coef=0.1, **settings)
    first = control.prepare(groups(), UPDATER)
    assert not any(flat([group.entropy_weights for group in first])), "no bonus before the first measurement"
    assert control.finish(result(0.0, 3.5, 7.0))["entropy_coef"] == pytest.approx(0.2)  # .5, at the target
    assert max(flat([group.entropy_weights for group in control.prepare(groups(), UPDATER)])) == pytest.approx(0.2 / 7)
    assert control.finish(result(0.0, 1.0, 7.0))["entropy_coef"] == 0.25  # no further
    assert control.finish(result(0.0, 7.0, 7.0))["entropy_coef"] == pytest.approx(0.15)
    assert not any(flat([group.entropy_weights for group in control.prepare(groups(), UPDATER)]))
    control.finish(result(0.0, 7.0, 7.0))
    assert control.finish(result(0.0, 7.0, 7.0))["entropy_coef"] == 0.05


def test_the_measured_entropy_is_of_all_ranks(make: Any) -> None:
    control = make(Ranks(2, sums=[93.0, 3.0]), use_adaptive_entropy=True, entropy_target=0.5)
    control.finish(result(0.0, 3.5, 7.0))
    assert control.last_entropy == pytest.approx(9.65)


def test_with_the_filter_what_it_keeps_is_measured(make: Any) -> None:
    control = make(top_entropy_quantile=0.5, use_adaptive_entropy=True, entropy_target=0.5)
    control.prepare(groups(), UPDATER)
    control.finish(result(0.0, 3.6, 7.0))
    assert control.last_entropy == pytest.approx((0.9 + 0.5 + 0.7 + 0.8) / 4)


def test_a_checkpoint_keeps_the_coefficient(make: Any) -> None:
    control, other = (make(use_adaptive_entropy=True, entropy_coef=0.1) for _ in range(2))
    control.finish(result(0.0, 0.7, 7.0))
    other.load(control.state())
    assert (other.coefficient, other.last_entropy) == (control.coefficient, control.last_entropy)
    other.load({})
    assert other.coefficient == control.coefficient
