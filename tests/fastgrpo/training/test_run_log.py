import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from fastgrpo.scoring.advantages import group_advantages
from fastgrpo.training.run_log import RunLog, completion_rows
from fastgrpo.types import Completion, Prompt, ScoredRollout


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completion_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "completions").iterdir())


def run_of(folder: Path, steps: int) -> RunLog:
    log = RunLog(folder)
    for step in range(1, steps + 1):
        log.metrics(step, {"reward": step / 10})
        log.completions(step, [{"row_id": step, "completion": "text", "prompt_length": 3}])
    return log


def group(row_id: int, rewards: list[list[float]], texts: list[str]) -> ScoredRollout:
    ids = torch.arange(4)
    prompt = Prompt(row_id, ids, ids.expand(3, -1), None, None, "text", None, {"task": "depth", "solution": 2}, b"jpeg")
    completions = tuple(
        Completion(row_id, i, torch.arange(i + 1), text, "stop", torch.zeros(i + 1), torch.zeros(i + 1))
        for i, text in enumerate(texts)
    )
    return ScoredRollout(prompt, completions, torch.tensor(rewards))


def test_each_step_is_one_line_and_one_file(tmp_path: Path) -> None:
    run_of(tmp_path / "out", 2).sync()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}]
    assert completion_files(tmp_path / "out") == ["completions_00001.parquet", "completions_00002.parquet"]
    [row] = pq.read_table(tmp_path / "out" / "completions" / "completions_00002.parquet").to_pylist()
    assert row == {"step": 2, "row_id": 2, "completion": "text"}  # what only metrics need stays out


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
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.txt").write_text("mine")
    log.start_over()
    moved = tmp_path / "previous-1"
    assert steps_in(moved) == [1, 2]
    assert completion_files(moved) == ["completions_00001.parquet", "completions_00002.parquet"]
    assert {name: (moved / name).read_text() for name in files} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous-1"]
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


def test_a_record_per_completion() -> None:
    groups = [
        group(7, [[1.0, 0.0], [0.0, torch.nan]], ["so <answer>2</answer>", "wait, let me check again"]),
        group(9, [[torch.nan, torch.nan], [torch.nan, torch.nan]], ["a", "b"]),
    ]
    advantages = group_advantages(torch.cat([g.rewards for g in groups]), 2)
    rows = completion_rows(groups, ["accuracy", "format"], advantages, thumbnails=True)
    assert [(row["row_id"], row["index"]) for row in rows] == [(7, 0), (7, 1), (9, 0), (9, 1)]
    assert [row["accuracy"] for row in rows] == [1.0, 0.0, None, None]
    assert [row["format"] for row in rows] == [0.0, None, None, None]
    assert [row["reward"] for row in rows] == [1.0, 0.0, None, None]
    assert rows[0]["advantage"] > 0 > rows[1]["advantage"]
    assert [row["advantage"] for row in rows[2:]] == [0.0, 0.0]
    assert [row["zero_std"] for row in rows] == [False, False, True, True]
    assert [row["reflective"] for row in rows] == [False, True, False, False]
    assert [row["thumbnail"] for row in rows] == [b"jpeg", None, b"jpeg", None]
    assert [(row["length"], row["prompt_length"]) for row in rows[:2]] == [(1, 4), (2, 4)]
    assert (rows[0]["task"], rows[0]["solution"]) == ("depth", "2")


def test_thumbnails_can_be_left_out() -> None:
    groups = [group(1, [[1.0], [0.0]], ["a", "b"])]
    rows: list[dict[str, Any]] = completion_rows(
        groups, ["f"], group_advantages(groups[0].rewards, 2), thumbnails=False
    )
    assert [row["thumbnail"] for row in rows] == [None, None]
