"""Supervised fine-tuning as a run: its figures, its files, and the same run however it is cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from run_files import changed, metrics_of, parameters

from fastgrpo import SFTConfig, SFTTrainer
from fastgrpo.data.loading import load_rows
from fastgrpo.model.load import load_policy

Build = Callable[..., SFTTrainer]
CLOCKS = ("step_time", "tokens_per_second", "mfu")


@pytest.fixture
def build(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Build:
    """A trainer of two rows a step."""

    def make(folder: str = "run", rows: Any = None, model: Any = None, **settings: Any) -> SFTTrainer:
        parts = {name: settings.pop(name) for name in ("eval_dataset", "peft_config") if name in settings}
        shared: dict[str, Any] = {
            "output_dir": str(tmp_path / folder), "use_cpu": True, "report_to": [], "save_strategy": "no",
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1,
            "disable_tqdm": True,
        }  # fmt: skip
        data = load_rows(str(sat_file)) if rows is None else rows
        return SFTTrainer(model or str(tiny_model_dir), SFTConfig(**shared | settings), data, **parts)

    return make


def figures(folder: Any) -> list[dict[str, Any]]:
    """The steps' figures but for times."""
    return [
        {name: value for name, value in line.items() if name not in CLOCKS and not name.startswith(("time/", "share/"))}
        for line in metrics_of(folder)
    ]


def test_it_learns_the_answers_and_leaves_a_runs_files(build: Build, sat_file: Path, tmp_path: Path) -> None:
    rows = load_rows(str(sat_file), max_samples=2)
    trainer = build(rows=rows, max_steps=12, lr_scheduler_type="constant")
    before = parameters(trainer)
    trainer.train()
    trainer.save_model()
    steps = metrics_of(tmp_path / "run")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-4)
    assert {"entropy", "grad_norm", "learning_rate", "num_tokens", "skipped_rows", "epoch", "mfu"} <= set(steps[0])
    assert steps[1]["num_tokens"] == 2 * steps[0]["num_tokens"] > 0
    assert changed(before, trainer) == before.keys()
    folder = tmp_path / "run"
    card = (folder / "README.md").read_text()
    assert {"sft", "fastgrpo"} <= set(ModelCard(card).data.tags)
    assert "trained with SFT" in card
    assert "reward functions" not in card
    settings = json.loads((folder / "settings.json").read_text())
    assert "reward_funcs" not in settings
    assert settings["train_on_prompt"] is False
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert "<html" in (folder / "report.html").read_text()


def test_the_loss_is_the_mean_over_a_steps_answers(build: Build, tmp_path: Path) -> None:
    trainer = build(shuffle_dataset=False, max_steps=1, per_device_train_batch_size=4)
    examples = trainer.data_collator([trainer.rows[i] for i in range(4)]).examples
    total = sum(len(example.targets) for example in examples)
    expected = trainer.updater.loss(examples)[0].item() / total
    trainer.train()
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulation_packing_and_the_plain_path_change_nothing(build: Build, tmp_path: Path) -> None:
    shared = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 3}
    build("whole", per_device_train_batch_size=4, **shared).train()
    build("cut", per_device_train_batch_size=2, gradient_accumulation_steps=2, token_budget=1, **shared).train()
    build("plain", per_device_train_batch_size=4, engine="plain", **shared).train()
    expected = figures(tmp_path / "whole")
    for folder in ("cut", "plain"):
        for ours, theirs in zip(figures(tmp_path / folder), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), folder


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_is_the_same_run(build: Build, sat_file: Path, tmp_path: Path, adapters: bool) -> None:
    rows = pq.read_table(sat_file).slice(0, 6).to_pylist()
    rows[1]["image_bytes"] = [b"no picture"]
    peft = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if adapters else None
    shared = {"rows": rows, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    build("whole", max_steps=4, peft_config=peft, **shared).train()
    build("stopped", max_steps=2, peft_config=peft, **shared).train()
    build("stopped", max_steps=4, peft_config=peft, **shared).train(resume_from_checkpoint=True)
    steps = figures(tmp_path / "whole")
    assert figures(tmp_path / "stopped") == steps
    assert steps[-1]["skipped_rows"] >= 1
    assert all(step["grad_norm"] > 0 for step in steps)


def test_frozen_parts_stay(build: Build, tiny_model_dir: Path) -> None:
    trainer = build(model=load_policy(str(tiny_model_dir), freeze_vision=True))
    before = parameters(trainer)
    trainer.train()
    moved = changed(before, trainer)
    assert any("language_model" in name for name in moved)
    assert {name for name in moved if "visual." in name} == {name for name in before if "merger" in name}


def test_held_out_rows(build: Build, sat_file: Path, tmp_path: Path) -> None:
    held_out = load_rows(str(sat_file), max_samples=5)
    trainer = build(eval_dataset=held_out, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    examples = trainer.data_collator([held_out[i] for i in range(5)]).examples
    total = sum(len(example.targets) for example in examples)
    loss, entropy = (trainer.updater.loss(examples) / total).tolist()
    found = trainer.evaluate()
    assert (found["eval_loss"], found["eval_entropy"]) == pytest.approx((loss, entropy), rel=1e-5)
    trainer.train()
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 2
    assert evaluated[-1] < loss


def test_without_any_usable_row_it_says_why(build: Build) -> None:
    with pytest.raises(ValueError, match=r"none of the 1 rows can be used; row 0: the row has no answer"):
        build(rows=[{"prompt": "How many?"}])
    with pytest.raises(ValueError, match="longer than max_length=3"):
        build(max_length=3)


def test_a_step_without_a_usable_row_trains_on_nothing(build: Build, tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": answer} for answer in ("4", "5", None, None)]
    trainer = build(rows=rows, shuffle_dataset=False, optim="sgd")
    trainer.train()
    first, second = metrics_of(tmp_path / "run")
    assert first["loss"] > 0
    assert (second["loss"], second["grad_norm"], second["skipped_rows"]) == (0, 0, 2)
    assert torch.isfinite(torch.tensor(first["entropy"]))
