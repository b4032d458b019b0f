"""Methods that subclasses override: called, or refused with what to override instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import changed, parameters
from transformers import Qwen2ForCausalLM

from fastgrpo import GRPOTrainer as PublicTrainer
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.training.trl_surface import NEVER_CALLED


@pytest.mark.parametrize("name", sorted(NEVER_CALLED))
def test_an_override_that_would_never_be_called_is_refused(build: Any, name: str) -> None:
    subclass = type("Mine", (GRPOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"Mine\.{name} overrides a method that is never called here: "):
        build(trainer_class=subclass)


def test_one_in_a_mixin_is_refused_too(build: Any) -> None:
    class Mixin:
        def compute_loss(self, *args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(ValueError, match=r"Mixin\.compute_loss"):
        build(trainer_class=type("Mine", (Mixin, GRPOTrainer), {}))


def test_a_subclass_without_such_overrides_is_welcome(build: Any) -> None:
    class Mine(PublicTrainer):
        def my_own(self) -> int:
            return 1

    assert build(trainer_class=Mine).my_own() == 1


def test_calculate_rewards_may_be_replaced(build: Any, texts: list[Any]) -> None:
    calls: list[Any] = []

    class Mine(GRPOTrainer):
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            calls.append((inputs, prompts, completions, completion_ids_list))
            return torch.arange(len(prompts)).float()[:, None]

    rows = [{**row, "level": i} for i, row in enumerate(texts)]
    trainer = build(trainer_class=Mine, train_dataset=rows, shuffle_dataset=False)
    trainer.train()
    (inputs, prompts, completions, ids) = calls[0]
    assert inputs[2] == {"prompt": "Explicit is better than", "level": 1}
    assert prompts == [row["prompt"] for row in inputs]
    assert len(completions) == len(ids) == 4
    assert trainer.state.log_history[0]["reward"] == 1.5


def test_calculate_rewards_may_be_extended(build: Any) -> None:
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, *given: Any) -> Any:
            return super()._calculate_rewards(*given) + 100.0

    def one(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("called", 1.0)
        return [1.0] * len(completions)

    trainer = build(reward_funcs=[one, "length"], trainer_class=Mine, reward_weights=[1.0, 0.0])
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/one/mean"] == 101.0
    assert line["reward"] == pytest.approx(101.0)
    assert line["called"] == 1.0


@pytest.mark.parametrize("name", ["training_step", "generate", "score", "advantages", "plan_updates", "update"])
def test_the_parts_of_a_step_may_be_overridden(build: Any, name: str) -> None:
    calls: list[str] = []

    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return getattr(GRPOTrainer, name)(self, *args, **kwargs)

    trainer = build(trainer_class=type("Mine", (GRPOTrainer,), {name: override}))
    trainer.train()
    assert calls == [name]


def test_log_may_be_overridden(build: Any) -> None:
    class Mine(GRPOTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs | {"mine": 7.0}, start_time)

    trainer = build(trainer_class=Mine)
    trainer.train()
    assert [line["mine"] for line in trainer.state.log_history] == [7.0, 7.0]


def test_create_optimizer_may_be_overridden(build: Any) -> None:
    class Mine(GRPOTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
            return self.optimizer

    trainer = build(trainer_class=Mine)
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.SGD)


def test_a_models_own_generate_draws_its_completions(build: Any, text_model: Path) -> None:
    class Scripted(Qwen2ForCausalLM):
        def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            end = self.config.pad_token_id
            drawn = torch.tensor([[40, 41, 42, 43], [50, 51, end, end]]).repeat(len(input_ids) // 2, 1)
            return torch.cat([input_ids, drawn], dim=1)

    trainer = build(model=Scripted.from_pretrained(text_model), mask_truncated_completions=True, shuffle_dataset=False)
    before = parameters(trainer)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["completions/mean_length"] == 3.5
    assert line["completions/clipped_ratio"] == 0.5
    assert line["sampling/sampling_logp_difference/max"] < 1e-4, "they are read by a forward pass"
    assert changed(before, trainer) == set(before)
