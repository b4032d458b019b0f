import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fastgrpo.training.completion_records import CompletionRecord
from fastgrpo.training.run_log import RunLog


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completion_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "completions").iterdir())


def completion(**changes: Any) -> CompletionRecord:
    fields = {
        "row_id": 1, "index": 0, "prompt": "a question", "completion": "text", "finish_reason": "stop", "length": 5,
        "prompt_length": 3, "advantage": 0.5, "reward": 1.0, "rewards": {"accuracy": 1.0},
    }  # fmt: skip
    return CompletionRecord(**fields | changes)


def rows_of(folder: Path, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "completions" / f"completions_{step:05d}.parquet").to_pylist()
    return rows


def run_of(folder: Path, steps: int) -> RunLog:
    log = RunLog(folder)
    for step in range(1, steps + 1):
        log.metrics(step, {"reward": step / 10})
        log.completions(step, [completion(row_id=step)])
    return log


def test_each_step_is_one_line_and_one_file(tmp_path: Path) -> None:
    run_of(tmp_path / "out", 2).sync()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}]
    assert completion_files(tmp_path / "out") == ["completions_00001.parquet", "completions_00002.parquet"]
    [row] = rows_of(tmp_path / "out", 2)
    assert (row["step"], row["row_id"], row["completion"]) == (2, 2, "text")
    assert not {"prompt_length", "zero_std", "reflections"} & row.keys(), "only metrics need them"


def test_names_that_users_choose_overwrite_nothing(tmp_path: Path) -> None:
    rewards, extra = {"length": 0.25, "reward": 0.5, "step": 9.0}, {"length": "said", "row_id": 7, "advantage": None}
    RunLog(tmp_path).completions(3, [completion(rewards=rewards, extra=extra)])
    [row] = rows_of(tmp_path, 3)
    assert (row["step"], row["row_id"], row["length"], row["reward"], row["advantage"]) == (3, 1, 5, 1.0, 0.5)
    assert {name: row[f"rewards/{name}"] for name in rewards} == rewards
    assert {name: row[f"extra/{name}"] for name in extra} == extra


def test_a_column_of_several_kinds_is_written_as_text(tmp_path: Path) -> None:
    records = [completion(extra={"seen": value}) for value in (1, "two", None, [3])]
    RunLog(tmp_path).completions(1, records)
    assert [row["extra/seen"] for row in rows_of(tmp_path, 1)] == ["1", "two", None, "[3]"]


def test_a_step_without_completions_writes_no_file(tmp_path: Path) -> None:
    RunLog(tmp_path).completions(1, [])
    assert not (tmp_path / "completions").exists()


def test_continue_after_drops_later_steps_and_half_a_line(tmp_path: Path) -> None:
    log = run_of(tmp_path, 5)
    with log.metrics_file.open("a") as file:
        file.write('{"step": 3, "rew')
    log.continue_after(3)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert log.metrics_file.read_text().endswith("}\n")
    assert completion_files(tmp_path) == [f"completions_{step:05d}.parquet" for step in (1, 2, 3)]
    log.metrics(4, {"reward": 0.4})
    assert steps_in(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", ["{", '{"step": 2', '{"step": 2, "reward": 0.', "\0\0\0", "{}"])
def test_continue_after_drops_lines_without_a_step(tmp_path: Path, broken: str) -> None:
    log = run_of(tmp_path, 2)
    with log.metrics_file.open("a") as file:
        file.write(broken)
    log.continue_after(2)
    assert steps_in(tmp_path) == [1, 2]


def test_continue_after_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path / "out").continue_after(0)
    log = run_of(tmp_path, 2)
    log.continue_after(0)
    assert steps_in(tmp_path) == []
    assert completion_files(tmp_path) == []


def test_start_over_moves_an_earlier_run_aside_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = run_of(tmp_path, 2)
    files = {
        "summary.json": "s", "report.html": "r", "settings.json": "c", "config.json": "m", "model.safetensors": "w",
        "tokenizer.json": "t", "evals/before.json": "b", "checkpoint-2/optimizer.pt": "o",
        "README.md": "d", "runs/Nov26_host/events.out.tfevents.1": "e",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "runs" / "my notes").mkdir()
    log.start_over()
    moved = tmp_path / "previous-1"
    assert steps_in(moved) == [1, 2]
    assert completion_files(moved) == ["completions_00001.parquet", "completions_00002.parquet"]
    assert {name: (moved / name).read_text() for name in files} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous-1", "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["my notes"], "no curves of the earlier run"
    assert [record.getMessage().endswith(f"moved to {moved}") for record in caplog.records] == [True]


def test_start_over_again_and_again(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        run_of(tmp_path, steps).start_over()
    assert [steps_in(tmp_path / f"previous-{n}") for n in (1, 2, 3)] == [[1], [1, 2], [1, 2, 3]]


def test_start_over_beside_a_gap_in_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "previous-2").mkdir(parents=True)
    (tmp_path / "previous-2" / "metrics.jsonl").write_text("kept")
    for steps in (1, 2):
        run_of(tmp_path, steps).start_over()
    assert [steps_in(tmp_path / f"previous-{n}") for n in (1, 3)] == [[1], [1, 2]]
    assert (tmp_path / "previous-2" / "metrics.jsonl").read_text() == "kept"


def test_start_over_in_a_folder_without_a_run_moves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("a model's")
    RunLog(tmp_path).start_over()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_stray_files_neither_stop_a_resume_nor_are_touched(tmp_path: Path) -> None:
    log = run_of(tmp_path, 3)
    stray = [
        "completions/completions_copy.parquet",
        "completions/completions_00003 (1).parquet",
        "checkpoint-best/model",
    ]
    for name in stray:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    lines = log.metrics_file.read_bytes().splitlines()
    log.metrics_file.write_bytes(
        b"\n".join([lines[0], b"\0\0", b"\xff\xfe", b"7", b"[1]", b"null", *lines[1:]]) + b"\n"
    )
    log.continue_after(2)
    assert steps_in(tmp_path) == [1, 2]
    assert all((tmp_path / name).read_text() == "mine" for name in stray)
    assert not list(tmp_path.glob("previous-*"))


def test_moving_that_was_killed_is_finished_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for moved_before_the_kill in range(5):
        folder = tmp_path / str(moved_before_the_kill)
        log = run_of(folder, 2)
        old = log.run_id()
        (folder / "checkpoint-2").mkdir()
        (folder / "checkpoint-2" / "optimizer.pt").write_text("o")
        left = [moved_before_the_kill]
        rename = Path.rename

        def renamed(path: Path, to: Path, left: list[int] = left, rename: Any = rename) -> Path:
            if "previous-1" in str(to):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return rename(path, to)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "rename", renamed)
            log.start_over()
        RunLog(folder).finish_moving()
        assert sorted(path.name for path in folder.iterdir()) == ["previous-1"]
        assert steps_in(folder / "previous-1") == [1, 2]
        assert (folder / "previous-1" / "checkpoint-2" / "optimizer.pt").read_text() == "o"
        assert RunLog(folder).known_run_id() is None
        assert RunLog(folder).run_id() != old


def test_what_is_to_be_moved_lies_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / "run").mkdir()
    plan = {"to": "previous-1", "paths": ["../other", str(tmp_path / "other")]}
    (tmp_path / "run" / ".moving.json").write_text(json.dumps(plan))
    RunLog(tmp_path / "run").finish_moving()
    assert (tmp_path / "other").read_text() == "kept"
