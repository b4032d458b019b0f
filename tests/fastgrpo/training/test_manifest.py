"""Damage of every kind, to every file of a checkpoint: found, named, and passed over by `last`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.training.checkpoints import find_checkpoint
from fastgrpo.training.manifest import damage, write_manifest

FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json", "rollout/rank0.safetensors")


def make(folder: Path, run_id: str = "mine") -> Path:
    (folder / "rollout").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(json.dumps(name * 100))
    write_manifest(folder, run_id)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_a_bit, "is damaged: its content has changed since it was saved"),
    "cut": (lambda path: os.truncate(path, 50), "is damaged: 50 bytes of "),
    "empty": (lambda path: os.truncate(path, 0), "is damaged: 0 bytes of "),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"0"), "is damaged: "),
    "gone": (lambda path: path.unlink(), "is missing"),
    "garbage": (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "is damaged: its content has changed"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_last_falls_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, file: str
) -> None:
    older, newer = make(tmp_path / "checkpoint-2"), make(tmp_path / "checkpoint-4")
    assert damage(newer) is None
    assert find_checkpoint("last", tmp_path, whole=True) == newer
    harm, told = DAMAGES[kind]
    harm(newer / file)
    found = damage(newer) or ""
    assert found.startswith(str(newer / file))
    assert told in found
    with pytest.raises(ValueError, match=r"Resume from another checkpoint, or with `last`") as error:
        find_checkpoint(str(newer), tmp_path, whole=True)
    assert str(newer / file) in str(error.value)
    assert find_checkpoint("last", tmp_path, whole=True) == older
    harm(older / file)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole\. Start anew"):
        find_checkpoint("last", tmp_path, whole=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', "\0\0"])
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    folder = make(tmp_path / "checkpoint-2")
    (folder / "manifest.json").write_text(content)
    assert damage(folder) == f"{folder / 'manifest.json'} is damaged"


def test_without_a_manifest_nothing_can_be_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-2")
    (folder / "manifest.json").unlink()
    flip_a_bit(folder / "optimizer.pt")
    assert damage(folder) is None
    assert find_checkpoint("last", tmp_path, run_id="mine", whole=True) == folder


def test_last_never_crosses_to_another_run(tmp_path: Path) -> None:
    mine, other = make(tmp_path / "checkpoint-2"), make(tmp_path / "checkpoint-9", run_id="another")
    assert find_checkpoint("last", tmp_path, run_id="mine") == mine
    assert find_checkpoint("last", tmp_path, run_id="third") is None
    assert find_checkpoint(str(other), tmp_path, run_id="mine") == other, "where it is asked for by name"


def test_files_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo.training.manifest.CHUNK_BYTES", 64)
    folder = make(tmp_path / "checkpoint-2")
    assert damage(folder) is None
    content = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(content[64:128] + content[:64] + content[128:])  # chunks change places
    assert "its content has changed" in (damage(folder) or "")
