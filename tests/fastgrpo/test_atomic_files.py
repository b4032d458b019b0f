import os
from pathlib import Path

import pytest

from fastgrpo import atomic_files
from fastgrpo.atomic_files import publish, remove, write_aside


def make_checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths synced to disk, in order."""
    paths: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
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
    inside = ("global_step2", "global_step2/shard.pt", "model.safetensors", "optimizer.pt")
    assert set(synced[:-1]) == {aside, *(aside / name for name in inside)}
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

    monkeypatch.setattr(atomic_files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(aside, old)
    assert os.listdir(old) == ["new"]


def test_a_link_where_a_file_is_written_aside_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / ".page.part").symlink_to(tmp_path / "other")
    write_aside(tmp_path / "page", lambda path: path.write_text("new"))
    assert (tmp_path / "other").read_text() == "kept"
    assert (tmp_path / "page").read_text() == "new"
    assert not (tmp_path / "page").is_symlink()


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name in ("link", "folder", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert (tmp_path / "other" / "file").read_text() == "kept"
