"""What scripts read of a trainer, and what they may add to its logs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastgrpo.training.trainer import GRPOTrainer


def test_no_reference_without_a_kl_term(build: Any) -> None:
    assert build().ref_model is None


def test_the_reference_starts_as_the_policy(build: Any) -> None:
    trainer = build(beta=0.1)
    trainer.train()
    for name, parameter in trainer.ref_model.named_parameters():
        assert not torch.equal(parameter, trainer.model.get_parameter(name)), name


def test_the_reference_follows_the_policy_when_asked(build: Any) -> None:
    trainer = build(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
    before = {name: parameter.clone() for name, parameter in trainer.ref_model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.ref_model.named_parameters():
        mean = (before[name] + trainer.model.get_parameter(name)) / 2
        torch.testing.assert_close(parameter, mean, atol=1e-5, rtol=1e-4)


def test_no_reference_of_its_own_with_fresh_adapters(build: Any) -> None:
    assert build(beta=0.1, peft_config=LoraConfig(r=2, target_modules=["q_proj"])).ref_model is None


def test_rewards_and_sizes(build: Any) -> None:
    def reward(completions: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = build(reward_funcs=[reward], num_generations_eval=3, beta=0.04)
    assert trainer.reward_funcs == [reward]
    assert trainer.reward_func_names == ["reward"]
    assert (trainer.num_generations, trainer.num_generations_eval) == (2, 3)
    assert trainer.max_completion_length == 4
    assert trainer.beta == 0.04
    assert trainer.reward_weights.tolist() == [1.0]


def test_evaluation_draws_as_training_does_by_default(build: Any) -> None:
    assert build().num_generations_eval == 2


def test_a_dense_model_has_no_balancing_loss(build: Any) -> None:
    assert build().aux_loss_enabled is False


def test_a_mixture_of_experts_has_one_unless_it_is_turned_off(build: Any, moe_model: Path) -> None:
    assert build(model=str(moe_model), router_aux_loss_coef=0.0).aux_loss_enabled is False
    lines = []
    for coefficient in (None, 0.5):
        trainer = build(model=str(moe_model), router_aux_loss_coef=coefficient)
        assert trainer.aux_loss_enabled
        trainer.train()
        lines.append(trainer.state.log_history[0])
    one, other = lines
    assert one["aux_loss"] == other["aux_loss"] > 0
    assert other["loss"] - one["loss"] == pytest.approx((0.5 - 0.001) * one["aux_loss"], rel=1e-4)


def test_metrics_since_the_last_line(build: Any) -> None:
    trainer = build(max_steps=3, logging_steps=10)
    seen: list[dict[str, int]] = []

    def look(completions: Any, **_: Any) -> list[float]:
        seen.append({name: len(values) for name, values in trainer._metrics["train"].items()})
        return [float(len(completion)) for completion in completions]

    trainer.reward_functions[0] = look
    trainer.train()
    assert [counts.get("reward", 0) for counts in seen] == [0, 1, 2]
    assert not trainer._metrics["train"], "the run's last line took them"


def test_what_is_appended_to_the_metrics_is_logged_as_its_mean(build: Any) -> None:
    def reward(completions: Any, **_: Any) -> list[float]:
        trainer._metrics["train"]["mine"] += [1.0, 4.0]
        return [0.0] * len(completions)

    trainer = build(reward_funcs=reward)
    trainer.train()
    assert trainer.state.log_history[0]["mine"] == 2.5


def test_the_last_completions_in_columns(build: Any) -> None:
    trainer = build(max_steps=2)
    trainer.train()
    logs = trainer._logs
    assert set(logs["prompt"]) <= {row["prompt"] for row in trainer.train_dataset}
    assert len(logs["prompt"]) == len(logs["completion"]) == len(logs["advantages"]) == 4
    assert len(logs["rewards"]["spread"]) == 4
    assert sum(logs["advantages"]) == pytest.approx(0, abs=1e-5)


def test_metrics_behind_the_last_logging_step_reach_the_last_line(build: Any) -> None:
    trainer = build(max_steps=3, logging_steps=2)
    trainer.train()
    second, last = trainer.state.log_history
    assert second["step"] == 2
    assert last["train_loss"] is not None
    assert {"rewards/spread/mean", "rewards/spread/std", "completions/mean_length", "num_tokens"} <= set(last)
    assert last["num_tokens"] > second["num_tokens"]


def test_they_reach_it_when_no_step_was_logged(build: Any) -> None:
    trainer = build(logging_steps=500)
    trainer.train()
    (line,) = trainer.state.log_history
    assert {"train_runtime", "train_loss", "reward", "reward_std", "frac_reward_zero_std"} <= set(line)


LOGGED = [
    "num_tokens", "step_time", "reward", "reward_std", "frac_reward_zero_std", "entropy", "grad_norm", "learning_rate",
    "epoch", "loss", "kl", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/mean_terminated_length", "completions/clipped_ratio", "rewards/spread/mean", "rewards/spread/std",
    "clip_ratio/low_mean", "clip_ratio/high_max", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/mean",
]  # fmt: skip


@pytest.mark.parametrize("name", LOGGED)
def test_a_log_line_has_trls_metric(first_line: dict[str, float], name: str) -> None:
    assert isinstance(first_line[name], float)


def test_the_high_entropy_mask_keeps_the_highest_of_those_that_count(build: Any) -> None:
    entropies = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    trainer = build()
    half = trainer.get_high_entropy_mask(entropies, mask, 0.5)
    assert half.tolist() == [[False, False, False, True], [True, True, False, False]]
    assert trainer.get_high_entropy_mask(entropies, mask, 0.0).equal(mask.bool())
    assert trainer.get_high_entropy_mask(entropies, mask, 1.0).nonzero().tolist() == [[1, 1]]
    assert not trainer.get_high_entropy_mask(entropies, torch.zeros_like(mask), 0.5).any()


def test_the_off_policy_mask_drops_bad_completions_that_moved_away() -> None:
    drawn = torch.zeros(4, 3)
    now = torch.tensor([[-2.0] * 3, [-0.5] * 3, [-2.0] * 3, [-2.0, float("nan"), 9.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]])
    kept = GRPOTrainer.get_off_policy_mask(advantages, now, drawn, mask, 1.0)
    assert kept.tolist() == [[1.0], [1.0], [0.0], [1.0]], "the last one's mean is 1: a token without log-prob counts 0"


def test_vespos_weights_are_one_on_policy_and_fall_off_it() -> None:
    log_ratio = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 7.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    weights = GRPOTrainer.get_gamma_weights(torch.tensor([[1.0], [1.0], [-1.0]]), log_ratio, mask, None)
    ratio = torch.tensor(0.5).exp()
    positive = (3 + 2 * 0.5 - 3 * ratio).exp()
    negative = (2 + 3 * 0.5 - 2 * ratio).exp()
    torch.testing.assert_close(weights, torch.stack([torch.tensor(1.0), positive, negative])[:, None])
