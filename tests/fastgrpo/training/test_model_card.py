"""The card beside every saved model."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.model_card import model_card
from fastgrpo.training.trainer import GRPOTrainer


def card(**changes: object) -> str:
    fields = {
        "base": "Qwen/Qwen2-VL-2B", "adapters": False, "multimodal": True, "step": 1500, "method": "grpo",
        "reward_names": ["tagged_accuracy", "tagged_format"],
        "settings": {"dataset_name": "array/SAT", "beta": 0.04, "learning_rate": 1e-6, "epsilon": None, "hub_token": 1},
        "metrics": [{"reward": 0.5, "rewards/tagged_accuracy/mean": 0.25}, {"reward": 1.0, "kl": None}],
        "scores": {"accuracy after training": 0.59, "chance": None},
    }  # fmt: skip
    return model_card(**fields | changes)  # type: ignore[arg-type]


def test_what_a_card_says() -> None:
    text = card()
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.library_name) == ("Qwen/Qwen2-VL-2B", ["array/SAT"], "transformers")
    assert data.pipeline_tag == "image-text-to-text"
    for row in (
        "| base model | Qwen/Qwen2-VL-2B |", "| training data | array/SAT |", "| optimizer steps | 1500 |",
        "| reward functions | tagged_accuracy, tagged_format |", "| beta | 0.04 |", "| learning_rate | 1e-06 |",
        "| mean of the last 2 steps | |", "| reward | 0.75 |", "| rewards/tagged_accuracy/mean | 0.25 |",
        "| accuracy after training | 0.59 |",
    ):  # fmt: skip
        assert row in text, row
    for unknown in ("epsilon", "chance", "kl", "tagged_format/mean", "hub_token"):
        assert f"| {unknown}" not in text


def test_folders_are_no_names_on_the_hub(tmp_path: Path) -> None:
    text = card(base=str(tmp_path / "base"), settings={"dataset_name": "rows.parquet"}, metrics=[], scores={})
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == (None, None)
    assert f"| base model | {tmp_path / 'base'} |" in text
    assert "mean of the last" not in text


@pytest.mark.parametrize("adapters", [False, True])
def test_every_saved_model_has_one(tiny_model_dir: Path, sat_file: Path, tmp_path: Path, adapters: bool) -> None:
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_steps=1, num_generations=2,
        per_device_train_batch_size=4, max_completion_length=4,
    )  # fmt: skip
    peft_config = LoraConfig(target_modules=["q_proj"]) if adapters else None
    trainer = GRPOTrainer(str(tiny_model_dir), "length", config, load_rows(str(sat_file)), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for folder, steps in ((tmp_path / "checkpoint-1", 1), (tmp_path / "checkpoint-2", 2), (tmp_path, 2)):
        text = (folder / "README.md").read_text()
        assert ModelCard(text).data.library_name == ("peft" if adapters else "transformers")
        assert f"| base model | {tiny_model_dir} |" in text
        assert f"| optimizer steps | {steps} |" in text
        reward = sum(step["reward"] for step in last[:steps]) / steps
        assert f"| reward | {reward:.4g} |" in text
        assert "[More Information Needed]" not in text
