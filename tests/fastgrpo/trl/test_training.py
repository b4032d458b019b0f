"""What a few steps change under each of TRL's settings: every parameter, or none where nothing was to learn."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_files import changed, parameters

datasets = pytest.importorskip("datasets")


def all_change(trainer: Any) -> None:
    before = parameters(trainer)
    trainer.train()
    assert changed(before, trainer) == set(before)
    assert trainer.state.log_history[-1]["train_loss"] is not None


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_every_loss_type_trains_over_accumulated_batches(build: Any, loss_type: str) -> None:
    all_change(build(loss_type=loss_type, gradient_accumulation_steps=2))


@pytest.mark.parametrize("scale_rewards", [False, "group", "batch", True, "none"])
def test_every_way_to_scale_rewards(build: Any, scale_rewards: Any) -> None:
    all_change(build(scale_rewards=scale_rewards))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "max_steps": 2},
        {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2, "loss_type": "grpo"},
        {"steps_per_generation": 2, "max_steps": 2},
        {"delta": 2.0},
        {"epsilon": 0.1, "epsilon_high": 0.3},
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": True},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1},
        {"temperature": 0.7},
        {"disable_dropout": True},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
        {"num_generations": 8, "gradient_accumulation_steps": 2},
        {"generation_batch_size": 8, "max_steps": 2},
        {"shuffle_dataset": False},
        {"optim": "sgd", "max_grad_norm": 0.5},
        {"engine": "plain"},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_every_parameter_changes_under(build: Any, settings: dict[str, Any]) -> None:
    all_change(build(**settings))


def test_conversations_with_variables_of_the_template(build: Any, chats: list[Any]) -> None:
    trainer = build(train_dataset=chats, chat_template_kwargs={"enable_thinking": False})
    all_change(trainer)
    assert trainer._logs["prompt"][0].startswith("<|im_start|>user")


def test_epochs_decide_the_steps_where_no_number_is_given(build: Any) -> None:
    trainer = build(max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert trainer.state.global_step == 6, "four rows, two a step, three times"


def test_truncated_completions_teach_nothing_when_masked(build: Any) -> None:
    def truncated(completions: Any, **_: Any) -> list[float]:
        return [float(i) for i in range(len(completions))]

    trainer = build(reward_funcs=truncated, mask_truncated_completions=True, max_completion_length=1, max_steps=2)
    before = parameters(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 1.0
    assert not changed(before, trainer)


def test_nothing_changes_where_nothing_is_scored(build: Any) -> None:
    def abstains(completions: Any, **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = build(reward_funcs=abstains)
    before = parameters(trainer)
    trainer.train()
    assert not changed(before, trainer)


def test_equal_rewards_teach_nothing(build: Any) -> None:
    def equal(completions: Any, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = build(reward_funcs=equal)
    before = parameters(trainer)
    trainer.train()
    assert not changed(before, trainer)
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1.0


def test_rewards_add_up_by_their_weights(build: Any) -> None:
    trainer = build(reward_funcs=["length", "think_format_reward"], reward_weights=[100.0, 3.0])
    trainer.train()
    line = trainer.state.log_history[0]
    parts = line["rewards/token_length/mean"], line["rewards/think_format_reward/mean"]
    assert line["reward"] == pytest.approx(100 * parts[0] + 3 * parts[1], abs=1e-5)


def test_one_weight_per_reward(build: Any) -> None:
    with pytest.raises(ValueError, match="reward_weights"):
        build(reward_weights=[1.0, 2.0])


def test_a_mixture_of_experts_trains(build: Any, moe_model: Path) -> None:
    trainer = build(model=str(moe_model))
    before = parameters(trainer)
    trainer.train()
    assert {name for name in before if "experts" not in name} <= changed(before, trainer)


PICTURES = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]


def picture_rows(column: str) -> Any:
    asked = {"role": "user", "content": "Which?"}
    values = PICTURES if column == "image" else [PICTURES, PICTURES[::-1]]
    return datasets.Dataset.from_list([{"prompt": [asked], column: value} for value in values * 2])


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"steps_per_generation": 2, "max_steps": 2}], ids=str)
def test_a_vision_model_trains(build: Any, tiny_model_dir: Path, column: str, settings: dict[str, Any]) -> None:
    all_change(build(model=str(tiny_model_dir), train_dataset=picture_rows(column), **settings))


def test_a_vision_model_trains_on_text_alone(build: Any, tiny_model_dir: Path, chats: list[Any]) -> None:
    trainer = build(model=str(tiny_model_dir), train_dataset=chats)
    before = parameters(trainer)
    trainer.train()
    assert {name for name in before if "visual" not in name} == changed(before, trainer)


def test_completions_are_logged_to_parquet(build: Any, tmp_path: Path) -> None:
    build(log_completions=True).train()
    assert (tmp_path / "run" / "completions" / "completions_00001.parquet").is_file()
