"""What a run does with a folder that holds another, with checkpoints, and with packages that are missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., tuple[int, list[str]]]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_checkpoint_of_weights_alone_cannot_resume(train: Train, refused: Callable[..., str], out: Path) -> None:
    code, lines = train("--save_strategy", "steps", "--save_steps", 1, "--save_only_model")
    assert code == 0, lines
    assert (out / "checkpoint-1" / "model.safetensors").is_file()
    for resume in ([out / "checkpoint-1"], []):
        assert "holds weights but no optimizer state" in refused("--resume_from_checkpoint", *resume)


def test_a_second_run_in_the_same_folder_keeps_the_first(train: Train, out: Path) -> None:
    assert train()[0] == 0
    first = (out / "metrics.jsonl").read_text()
    assert train("--seed", 1)[0] == 0
    assert (out / "previous-1" / "metrics.jsonl").read_text() == first
    assert (out / "previous-1" / "model.safetensors").is_file()
    assert [line["step"] for line in metrics(out)] == [1]


def test_missing_packages_are_one_warning_each_and_the_run_goes_on(
    train: Train, out: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgrpo.settings.run_config.find_spec", lambda name: None if name == "wandb" else object())
    code, lines = train("--report_to", "wandb", "--attn_implementation", "flash_attention_2", "--use_liger_kernel")
    assert code == 0, lines
    warnings = [record.getMessage() for record in caplog.records]
    for name in ("wandb", "flash_attention_2", "use_liger_kernel"):
        assert sum(name in warning for warning in warnings) == 1, warnings
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    assert [line["step"] for line in metrics(out)] == [1]
