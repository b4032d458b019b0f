import json
from pathlib import Path

import pytest

from fastgrpo.training.checkpoints import checkpoints_of, find_checkpoint, load_state, rotate, save_state


def make_checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(name)
    return folder


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


def test_what_only_looks_like_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    others = {"checkpoint-best", "checkpoint-3-copy", "checkpoint-", "my-checkpoint-4"}
    for name in ("checkpoint-2", "checkpoint-10", *others):
        make_checkpoint(tmp_path / name, *RESUMABLE)
    (tmp_path / "checkpoint-99").write_text("a file")
    assert list(checkpoints_of(tmp_path)) == [2, 10]
    assert find_checkpoint("last", tmp_path) == tmp_path / "checkpoint-10"
    rotate(tmp_path, 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-99", *others}


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, 1, [1, 4]),
        (1, 4, [4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, limit: int | None, best: int | None, kept: list[int]
) -> None:
    for number in (1, 2, 3, 4):
        make_checkpoint(tmp_path / f"checkpoint-{number}", *RESUMABLE)
    rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert list(checkpoints_of(tmp_path)) == kept
