"""trainer.evaluate()."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import changed, metrics_of, parameters, token_sum

from fastgrpo.data.loading import load_rows


def test_evaluate(build: Any, cvbench_file: Path) -> None:
    rows = load_rows(str(cvbench_file), max_samples=5)
    trainer = build([token_sum, "format"], eval_dataset=rows, num_generations_eval=2, per_device_eval_batch_size=3)
    before, state = parameters(trainer), torch.get_rng_state()
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_rewards/token_sum/mean", "eval_completions/mean_length"} <= set(metrics)
    assert metrics["eval_rewards/tagged_format/mean"] == 0.0
    clocks = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert {name: value for name, value in trainer.evaluate().items() if name not in clocks} == {
        name: value for name, value in metrics.items() if name not in clocks
    }
    assert changed(before, trainer) == set()
    assert torch.equal(torch.get_rng_state(), state)
    assert {"eval_reward"} <= set(trainer.state.log_history[-1])
    assert set(trainer.evaluate(rows, metric_key_prefix="test")) == {name.replace("eval_", "test_") for name in metrics}


def test_evaluation_does_not_disturb_training(build: Any, cvbench_file: Path, tmp_path: Path) -> None:
    rewards = []
    for strategy in ("no", "steps"):
        trainer = build(
            eval_dataset=load_rows(str(cvbench_file), max_samples=3), eval_strategy=strategy, eval_steps=1, max_steps=3,
            num_generations_eval=2, output_dir=str(tmp_path / strategy),
        )  # fmt: skip
        trainer.train()
        rewards.append([(step["reward"], step["loss"]) for step in metrics_of(tmp_path / strategy)])
    assert rewards[0] == rewards[1]
    assert [line["step"] for line in trainer.state.log_history if "eval_reward" in line] == [1, 2, 3]


def test_evaluation_needs_rows(build: Any) -> None:
    with pytest.raises(ValueError, match="eval_dataset is missing"):
        build().evaluate()
