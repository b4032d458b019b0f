"""Data that cannot be read, and rows that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Train = Callable[..., tuple[int, list[str]]]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_missing_data_file(refused: Callable[..., str]) -> None:
    assert "dataset_name='nowhere.parquet': no such file or folder" in refused("--dataset_name", "nowhere.parquet")


def test_missing_evaluation_file(refused: Callable[..., str]) -> None:
    assert "dataset_name='nowhere.parquet': no such file" in refused("--eval_dataset_name", "nowhere.parquet")


def test_wrong_schema_names_columns_found_and_wanted(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.parquet"
    pq.write_table(pa.table({"picture": ["a"], "text": ["b"]}), path)
    line = refused("--dataset_name", path)
    assert "has the columns picture, text, which fit no schema" in line
    assert "image_bytes, question" in line


def test_empty_data_set(refused: Callable[..., str], data: Callable[..., Path], tmp_path: Path) -> None:
    assert "has no rows" in refused("--dataset_name", data(count=0))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "has no rows" in refused("--dataset_name", empty)


def test_data_that_is_no_parquet(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet at all")
    assert "cannot be read" in refused("--dataset_name", path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_bytes": [b"no picture"]}, "image 1 of 1: image cannot be decoded: its format is unknown"),
        ({"image_bytes": [b"\x89PNG\r\n\x1a\n"]}, "image 1 of 1: image cannot be decoded"),
        ({"image_bytes": []}, "image_bytes is empty"),
        ({"correct_answer": "purple"}, "correct_answer 'purple' is not among the answers"),
        ({"question": "Is <|image_pad|> here?"}, "the text holds the special token <|image_pad|>"),
        ({"question": "far and near " * 400}, "is longer than max_prompt_length=400"),
    ],
)
def test_a_bad_row_is_skipped_named_once_and_counted(
    train: Train,
    data: Callable[..., Path],
    out: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    reason: str,
) -> None:
    file = data(4, {2: change})
    # Two epochs of two steps, two rows each: row 2 comes up twice.
    flags = ["--dataset_name", file, "--no_shuffle_dataset", "--max_steps", 4, "--max_prompt_length", 400]
    code, lines = train(*flags)
    assert code == 0, lines
    assert [line["skipped_rows"] for line in metrics(out)] == [0, 1, 1, 2]
    [message] = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert message.startswith("row 2 skipped: ")
    assert reason in message
    rows = [pq.read_table(out / "completions" / f"completions_{n:05d}.parquet").column("row_id") for n in (1, 2, 3, 4)]
    assert [column.to_pylist() for column in rows] == [[0, 0, 1, 1], [3, 3], [0, 0, 1, 1], [3, 3]]


@pytest.mark.parametrize(
    ("change", "flags", "reason"),
    [
        ({"image_bytes": [b"no picture"]}, [], "row 0: image 1 of 1: image cannot be decoded"),
        ({"correct_answer": "purple"}, [], "row 0: correct_answer 'purple' is not among the answers"),
        ({}, ["--max_prompt_length", "5"], "is longer than max_prompt_length=5"),
    ],
)
def test_no_good_row_at_all(
    refused: Callable[..., str], data: Callable[..., Path], change: dict[str, Any], flags: list[str], reason: str
) -> None:
    line = refused("--dataset_name", data(4, dict.fromkeys(range(4), change)), *flags)
    assert "none of the 4 rows can be used" in line
    assert reason in line


def test_a_rollout_of_bad_rows_alone_is_no_end(train: Train, data: Callable[..., Path], out: Path) -> None:
    file = data(4, {row: {"image_bytes": [b"no picture"]} for row in (0, 1)})
    code, lines = train("--dataset_name", file, "--no_shuffle_dataset", "--max_steps", 2, "--beta", 0.1)
    assert code == 0, lines
    first, second = metrics(out)
    assert (first["skipped_rows"], first["loss"], first["grad_norm"]) == (2, 0.0, 0.0)
    assert "reward" not in first
    assert (second["skipped_rows"], second["completions/mean_length"] > 0) == (2, True)
