import json
import os
from pathlib import Path

import pytest

from fastgrpo import checkpoint as checkpoint_module
from fastgrpo.checkpoint import find_checkpoint, load_state, publish, save_state, write_aside


def make_checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths synced to disk, in order."""
    paths: list[Path] = []
    sync = checkpoint_module._sync
    monkeypatch.setattr(checkpoint_module, "_sync", lambda path: (paths.append(path), sync(path)))
    return paths


def test_write_aside_shows_the_whole_file_at_once(tmp_path: Path, synced: list[Path]) -> None:
    target = tmp_path / "metrics.jsonl"
    target.write_text("old")

    def write(path: Path) -> None:
        path.write_text("half")
        assert target.read_text() == "old"
        path.write_text("new")

    write_aside(target, write)
    assert target.read_text() == "new"
    assert [path.name for path in synced] == [".metrics.jsonl.part"]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_aside(target, fail)
    assert target.read_text() == "old"
    write_aside(target, lambda path: path.write_text("new"))  # what was left beside it is no obstacle
    assert target.read_text() == "new"


def test_publish_syncs_every_file_before_the_rename(tmp_path: Path, synced: list[Path]) -> None:
    aside = make_checkpoint(tmp_path / ".saving" / "checkpoint-2", "model.safetensors", "optimizer.pt")
    make_checkpoint(aside / "global_step2", "shard.pt")
    publish(aside, tmp_path / "checkpoint-2")
    assert not aside.exists()
    assert (tmp_path / "checkpoint-2" / "global_step2" / "shard.pt").read_text() == "shard.pt"
    assert {path.name for path in synced[:-1]} == {
        "checkpoint-2", "global_step2", "shard.pt", "model.safetensors", "optimizer.pt",
    }  # fmt: skip
    assert synced[-1] == tmp_path


def test_publish_replaces_an_existing_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-2", "model.safetensors", "stale.pt")
    aside = make_checkpoint(tmp_path / ".saving" / "checkpoint-2", "model.safetensors")
    (aside / "model.safetensors").write_text("new")
    publish(aside, tmp_path / "checkpoint-2")
    assert os.listdir(tmp_path / "checkpoint-2") == ["model.safetensors"]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_text() == "new"
    assert os.listdir(tmp_path / ".saving") == []


def test_publish_killed_while_replacing_never_leaves_half_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops, checkpoint-2 is the old one, the new one, or absent."""
    old = make_checkpoint(tmp_path / "checkpoint-2", "a", "b", "c")
    aside = make_checkpoint(tmp_path / ".saving" / "checkpoint-2", "new")

    def killed(path: Path, **_: object) -> None:
        next(Path(path).iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(aside, old)
    assert os.listdir(old) == ["new"]


RESUMABLE = ("model.safetensors", "trainer_state.json", "optimizer.pt")


@pytest.mark.parametrize("resume", [None, False, "false", "False"])
def test_no_checkpoint_asked_for(tmp_path: Path, resume: str | bool | None) -> None:
    make_checkpoint(tmp_path / "checkpoint-2", *RESUMABLE)
    assert find_checkpoint(resume, tmp_path) is None


@pytest.mark.parametrize("resume", [True, "last", "true", "True"])
def test_last_is_the_newest_by_number(tmp_path: Path, resume: str | bool) -> None:
    for number in (9, 100, 20):
        make_checkpoint(tmp_path / f"checkpoint-{number}", *RESUMABLE)
    make_checkpoint(tmp_path / ".saving" / "checkpoint-200", *RESUMABLE)  # a save that was killed
    assert find_checkpoint(resume, tmp_path) == tmp_path / "checkpoint-100"


def test_last_of_nothing_is_the_start(tmp_path: Path) -> None:
    assert find_checkpoint("last", tmp_path) is None
    assert find_checkpoint("last", tmp_path / "not_made_yet") is None


def test_a_named_folder_need_not_be_of_this_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "elsewhere" / "checkpoint-2", *RESUMABLE)
    assert find_checkpoint(str(folder), tmp_path / "out") == folder


@pytest.mark.parametrize("shards", ["optimizer.bin", "global_step2"])
def test_optimizer_state_in_other_forms(tmp_path: Path, shards: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-2", "trainer_state.json", shards)
    assert find_checkpoint(str(folder), tmp_path) == folder


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='runs/none' is not a folder.*`last`"):
        find_checkpoint("runs/none", tmp_path)


@pytest.mark.parametrize("files", [("model.safetensors", "trainer_state.json"), ("model.safetensors", "optimizer.pt")])
def test_a_checkpoint_of_weights_alone_cannot_resume(tmp_path: Path, files: tuple[str, ...]) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-2", *files)
    for resume in (str(folder), "last"):
        with pytest.raises(ValueError, match=r"checkpoint-2' holds weights but no optimizer state.*save_only_model"):
            find_checkpoint(resume, tmp_path)


def test_state_round_trip(tmp_path: Path) -> None:
    state = {"step": 3, "skipped_rows": 1, "window": {"reward": [0.1, 1 / 3]}}
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state
    assert json.loads((tmp_path / "fastgrpo_state.json").read_text()) == state
    assert load_state(None) == {}
    assert load_state(tmp_path / "none") == {}
