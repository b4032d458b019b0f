"""What a run writes holds no secret, and goes nowhere but into its own folder."""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.report.trainer import GRPOTrainer

TOKEN = "hf_" + "abcDEF123456" * 3
KEY = "0123456789abcdef0123"


def test_tokens_are_in_no_file_and_no_log(
    build: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    trainer = build(
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        hub_token=TOKEN,
        run_name=f"by {KEY}",
        report_to=["tensorboard"],
        chat_template_kwargs={"token": "my-own-token"},
        trainer_class=GRPOTrainer,
    )
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"settings.json", "report.html", "model.safetensors", "trainer_state.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "training_args.bin" not in names
    contents = {str(path): path.read_bytes() for path in files}
    contents["output"] = "".join([*capfd.readouterr(), caplog.text]).encode()
    for name, content in contents.items():
        for secret in (TOKEN, KEY, "my-own-token"):
            assert secret.encode() not in content, name
    assert not any((tmp_path / "temp").iterdir()), "nothing is left where everybody can read"


def test_a_link_in_the_place_of_saving_is_not_followed(build: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-1").mkdir(parents=True)
    (elsewhere / "checkpoint-1" / "mine").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".saving").symlink_to(elsewhere)
    build(max_steps=1, save_strategy="steps", save_steps=1).train()
    assert [path.name for path in (elsewhere / "checkpoint-1").iterdir()] == ["mine"]
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoint-1").is_symlink()
