"""Going on from a checkpoint under other settings: told, or refused."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig
from run_files import token_sum

from fastgrpo.data.loading import load_rows


def another(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.fixture
def saved(build: Any, tmp_path: Path) -> Path:
    """checkpoint-1 of a run of one step."""
    build(max_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.01).train()
    return tmp_path / "run" / "checkpoint-1"


def test_the_checkpoint_knows_its_run(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["run_id"] == (saved.parent / "run_id").read_text().strip()
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == names - {"manifest.json"}


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What our loggers warn of; transformers' do not pass it on."""
    lines: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Heard(), transformers.utils.logging.get_logger("fastgrpo.training.same_run")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 7}, "seed 42 → 7"),
        ({"num_generations": 2}, "num_generations 4 → 2"),
        ({"per_device_train_batch_size": 4}, "prompts per rollout [2, 1] → [1, 1]"),
        ({"num_iterations": 2}, "num_iterations 1 → 2"),
        ({"reward_funcs": another}, "rewards ['token_sum'] → ['another']"),
        ({"shuffle_dataset": False}, "shuffle_dataset True → False"),
    ],
)
def test_another_run_is_refused_unless_the_user_insists(
    build: Any, saved: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match="pass --resume_changed to go on all the same") as error:
        build(max_steps=2, learning_rate=0.01, **changes).train(resume_from_checkpoint=str(saved))
    assert told in str(error.value)


def test_other_rows(build: Any, saved: Path, sat_file: Path) -> None:
    fewer = load_rows(str(sat_file), max_samples=32)
    with pytest.raises(ValueError, match="rows 64 → 32"):
        build(max_steps=2, learning_rate=0.01, train_dataset=fewer).train(resume_from_checkpoint=True)
    trainer = build(max_steps=2, learning_rate=0.01, train_dataset=fewer, resume_changed=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_what_a_checkpoint_cannot_become(build: Any, saved: Path) -> None:
    for changes, told in (
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}, "adapters none → "),
        ({"optim": "sgd"}, "optim .* → sgd"),
    ):
        with pytest.raises(ValueError, match=f"cannot be gone on from: {told}"):
            build(max_steps=2, resume_changed=True, **changes).train(resume_from_checkpoint=True)


def test_settings_that_may_change_are_told_in_one_line(build: Any, saved: Path, warned: list[str]) -> None:
    trainer = build(max_steps=2, learning_rate=0.02, temperature=0.5, logging_steps=7)
    warned.clear()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    (line,) = [line for line in warned if "under other settings" in line]
    assert line.startswith(f"Going on from {saved} under other settings: ")
    for told in ("learning_rate 0.01 → 0.02", "temperature 1.0 → 0.5", "max_steps 1 → 2"):
        assert told in line
    assert "logging_steps" not in line


def test_a_damaged_checkpoint_is_passed_over(build: Any, tmp_path: Path) -> None:
    build(max_steps=2, save_strategy="steps", save_steps=1).train()
    run = tmp_path / "run"
    os.truncate(run / "checkpoint-2" / "optimizer.pt", 10)
    trainer = build(max_steps=3, save_strategy="no")
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 3
    assert (run / "previous-1" / "checkpoint-2" / "optimizer.pt").is_file(), "moved, not lost"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_reward_that_changes_the_working_directory(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")

    def wandering(**columns: Any) -> list[float]:
        os.chdir(tmp_path / "b")
        return token_sum(**columns)

    build(wandering, output_dir="run", max_steps=2, save_strategy="steps", save_steps=1).train()
    assert not list((tmp_path / "b").iterdir())
    assert {"metrics.jsonl", "checkpoint-2"} <= {path.name for path in (tmp_path / "a" / "run").iterdir()}
