"""What a run writes holds no secret, and goes nowhere but into its own folder."""

from pathlib import Path
from typing import Any

from fastgrpo.report.trainer import GRPOTrainer

TOKEN = "hf_" + "abcDEF123456" * 3


def test_tokens_are_in_no_file(build: Any, tmp_path: Path) -> None:
    trainer = build(
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        hub_token=TOKEN,
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
    for path in files:
        content = path.read_bytes()
        assert TOKEN.encode() not in content, path
        assert b"my-own-token" not in content, path


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
