"""A benchmark's rows from files and folders as they are published."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_rows import blink_row

from fastgrpo.data.benchmarks import load_benchmark


def write_blink(path: Path, task: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([blink_row(task, i) for i in range(count)]), path)


def tasks(rows: object) -> list[str]:
    return [rows.convert(*rows[i]).columns["task"] for i in range(len(rows))]


def test_a_file_of_one_task(tmp_path: Path) -> None:
    write_blink(tmp_path / "blink.parquet", "Counting", 3)
    assert tasks(load_benchmark("blink", str(tmp_path / "blink.parquet"))) == ["Counting"] * 3


@pytest.mark.parametrize("name", ["val-00000-of-00001.parquet", "anything.parquet"])
def test_a_folder_laid_out_as_on_the_hub(tmp_path: Path, name: str) -> None:
    write_blink(tmp_path / "Relative_Depth" / name, "Relative_Depth", 2)
    write_blink(tmp_path / "Spatial_Relation" / name, "Spatial_Relation", 3)
    rows = load_benchmark("blink", str(tmp_path))
    assert tasks(rows) == ["Relative_Depth"] * 2 + ["Spatial_Relation"] * 3
    assert [rows[i][0] for i in range(5)] == list(range(5)), "rows are numbered through"
    assert len(rows.files) == 2
    assert len(load_benchmark("blink", str(tmp_path), max_samples=1)) == 2, "of each task"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_statements_from_json(tmp_path: Path, suffix: str) -> None:
    records = [{"image": "1.jpg", "caption": f"Statement {i}.", "label": i % 2} for i in range(4)]
    text = json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records))
    (tmp_path / f"vsr{suffix}").write_text(text)
    rows = load_benchmark("vsr", str(tmp_path / f"vsr{suffix}"))
    assert (rows.schema, len(rows), (rows.folders or [None])[0]) == ("vsr", 4, tmp_path)
    folders = load_benchmark("vsr", str(tmp_path), pictures=tmp_path / "pictures").folders or ()
    assert folders[:2] == (tmp_path / "pictures", tmp_path)


def test_a_folder_with_one_split_of_another_name(tmp_path: Path, cvbench_file: Path, sat_file: Path) -> None:
    shutil.copy(cvbench_file, tmp_path / "train.parquet")
    assert len(load_benchmark("cvbench", str(tmp_path))) == 24
    shutil.copy(cvbench_file, tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="has no split 'test', only train, validation"):
        load_benchmark("cvbench", str(tmp_path))
    assert len(load_benchmark("cvbench", str(tmp_path), split="train", max_samples=5)) == 5


def test_rows_of_another_benchmark(sat_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--benchmark cvbench: .* has rows of the schema 'sat'; wanted"):
        load_benchmark("cvbench", str(sat_file))
