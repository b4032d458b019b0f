"""trainer.evaluate() under TRL's names, on one set or several, during training and before it."""

import math
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")


def rows(*prompts: str) -> Any:
    return datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])


def test_rewards_lengths_loss_kl_and_entropy(build: Any) -> None:
    trainer = build(eval_dataset=rows("a", "b", "c"), beta=0.1)
    metrics = trainer.evaluate()
    wanted = {"eval_loss", "eval_kl", "eval_entropy", "eval_reward", "eval_reward_std", "eval_rewards/spread/mean"}
    assert wanted | {"eval_completions/mean_length"} <= set(metrics)
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-6), "the policy still is its reference"
    assert 0 < metrics["eval_entropy"] <= math.log(len(trainer.processing.tokenizer)) + 1e-4
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]


def test_runtime_and_throughput(build: Any) -> None:
    metrics = build(eval_dataset=rows("a", "b", "c"), per_device_eval_batch_size=2).evaluate()
    runtime = metrics["eval_runtime"]
    assert metrics["eval_samples_per_second"] * runtime == pytest.approx(6, rel=0.2), "completions"
    assert metrics["eval_steps_per_second"] * runtime == pytest.approx(2, rel=0.2), "batches"


def test_the_kl_term_counts_in_the_loss(build: Any) -> None:
    def constant(completions: Any, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = build(reward_funcs=[constant, "length"], eval_dataset=rows("a", "b"), beta=0.5, reward_weights=[1.0, 0.0])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-6)
    trainer.model.get_input_embeddings().weight.data[:] += 0.05
    trainer.model.lm_head.weight.data[::2] += 0.5
    trainer.engine.sync()
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] > 1e-4
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_kl"], rel=1e-3)


def test_no_kl_without_a_reference(build: Any) -> None:
    assert "eval_kl" not in build(eval_dataset=rows("a")).evaluate()


def test_several_sets_by_name(build: Any) -> None:
    held_out = {"easy": rows("a"), "hard": rows("b", "c")}
    trainer = build(eval_dataset=held_out)
    metrics = trainer.evaluate()
    assert {"eval_easy_reward", "eval_hard_reward", "eval_easy_loss", "eval_hard_runtime"} <= set(metrics)
    assert not any(name.startswith("eval_reward") for name in metrics)


def test_a_dict_of_splits(build: Any) -> None:
    held_out = datasets.DatasetDict({"val": rows("a"), "test": rows("b")})
    assert {"eval_val_reward", "eval_test_reward"} <= set(build(eval_dataset=held_out).evaluate())


def test_one_set_of_several_by_its_name(build: Any) -> None:
    trainer = build(eval_dataset={"easy": rows("a"), "hard": rows("b", "c")})
    assert "eval_reward" in trainer.evaluate("easy")


def test_other_rows_than_the_trainers(build: Any) -> None:
    metrics = build().evaluate([{"prompt": "a"}], metric_key_prefix="test")
    assert {"test_reward", "test_loss", "test_runtime"} <= set(metrics)


def test_a_stream_is_evaluated_whole(build: Any) -> None:
    metrics = build(eval_dataset=rows("a", "b", "c").to_iterable_dataset()).evaluate()
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(6, rel=0.2)


def test_its_own_number_of_completions(build: Any) -> None:
    seen = []

    def look(completions: Any, **_: Any) -> list[float]:
        seen.append(len(completions))
        return [0.0] * len(completions)

    build(reward_funcs=look, eval_dataset=rows("a", "b"), num_generations_eval=3).evaluate()
    assert sum(seen) == 6


def test_one_completion_each(build: Any) -> None:
    metrics = build(eval_dataset=rows("a", "b"), num_generations_eval=1).evaluate()
    assert metrics["eval_loss"] == pytest.approx(0, abs=1e-6)


def test_evaluation_before_the_first_step_and_during_training(build: Any) -> None:
    trainer = build(
        eval_dataset=rows("a", "b"), eval_strategy="steps", eval_steps=1, eval_on_start=True, max_steps=2,
        loss_type="grpo",
    )  # fmt: skip
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_reward" in line] == [0, 1, 2]
    assert [line["step"] for line in trainer.state.log_history if "loss" in line and "eval_loss" not in line][:2] == [
        1,
        2,
    ]


def test_metrics_that_rewards_log_in_evaluation(build: Any) -> None:
    def measured(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("seen", len(completions))
        log_extra("ignored", [0] * len(completions))
        return [0.0] * len(completions)

    trainer = build(reward_funcs=measured, eval_dataset=rows("a"))
    assert trainer.evaluate()["eval_seen"] == 2
    trainer.train()
    assert trainer.state.log_history[-2]["seen"] == 4, "evaluation left nothing behind"


def test_the_best_checkpoint_is_loaded(build: Any, tmp_path: Any) -> None:
    score = iter([3.0, 9.0, 1.0])

    def scripted(completions: Any, trainer_state: Any, **_: Any) -> list[float]:
        if trainer.model.training:
            return [float(i) for i in range(len(completions))]
        return [next(score)] * len(completions)

    trainer = build(
        reward_funcs=scripted, eval_dataset=rows("a"), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, max_steps=3, load_best_model_at_end=True, metric_for_best_model="reward", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 9.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_the_best_checkpoint_of_one_set_among_several(build: Any) -> None:
    trainer = build(
        eval_dataset={"easy": rows("a"), "hard": rows("b")}, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_hard_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1


def test_an_evaluation_set_without_rows_is_named(build: Any) -> None:
    with pytest.raises(ValueError, match=r"eval_dataset\['easy'\] has no rows"):
        build(eval_dataset={"easy": []})
