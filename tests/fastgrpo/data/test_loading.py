import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastgrpo.data import loading
from fastgrpo.data.loading import load_rows
from fastgrpo.data.row_dataset import warn_of_shared_rows
from fastgrpo.types import RowError

datasets = pytest.importorskip("datasets")

SAT_SCHEMA = pa.schema(
    {
        "image_bytes": pa.list_(pa.binary()),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "question_type": pa.string(),
        "correct_answer": pa.string(),
    }
)
CVBENCH_SCHEMA = pa.schema(
    {
        "idx": pa.int64(),
        "type": pa.string(),
        "task": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(),
        "choices": pa.list_(pa.string()),
        "answer": pa.string(),
        "prompt": pa.string(),
        "bbox": pa.list_(pa.list_(pa.float64())),
    },
    # what the hub's files carry, and what makes `datasets` decode the column
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def encode(width: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 10)).save(buffer, format="JPEG")
    return buffer.getvalue()


def sat_records(count: int, images: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "image_bytes": [encode()] * (2 if images == 2 and i % 3 == 0 else 1),
            "question": f"Question {i}?",
            "answers": ["left", "right"],
            "question_type": "other",
            "correct_answer": "left",
        }
        for i in range(count)
    ]


def cvbench_records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "idx": i,
            "type": "2D",
            "task": "Count",
            "image": {"bytes": encode(), "path": None},
            "question": "How many?",
            "choices": ["1", "2"],
            "answer": "(B)",
            "prompt": "How many? (A) 1 (B) 2",
            "bbox": [[0.0, 1.0]],
        }
        for i in range(count)
    ]


def write_sat(path: Path, records: list[dict[str, Any]], **options: Any) -> str:
    pq.write_table(pa.Table.from_pylist(records, schema=SAT_SCHEMA), path, **options)
    return str(path)


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_sat_parquet(tmp_path: Path) -> None:
    dataset = load_rows(write_sat(tmp_path / "SAT_train.parquet", sat_records(5)), seed=3)
    assert (len(dataset), dataset.schema) == (5, "sat")
    index, raw = dataset[4]
    assert (index, raw) == (4, sat_records(5)[4])
    row = dataset.convert(index, raw)
    assert row.row_id == 4
    assert row.columns["solution"] == "left"
    assert row.images[0].size == (20, 10)


def test_the_seed_reaches_the_shuffle(tmp_path: Path) -> None:
    path = write_sat(tmp_path / "SAT_train.parquet", sat_records(30))

    def orders(seed: int) -> list[list[str]]:
        dataset = load_rows(path, seed=seed)
        return [dataset.convert(*dataset[i]).columns["choices"] for i in range(30)]

    assert orders(0) == orders(0) != orders(1)


def test_cvbench_parquet_is_not_decoded_on_reading(tmp_path: Path) -> None:
    records = cvbench_records(3)
    records[1]["image"] = {"bytes": b"nonsense", "path": None}
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(records, schema=CVBENCH_SCHEMA), path)
    dataset = load_rows(str(path))
    assert dataset.schema == "cvbench"
    assert dataset[0][1]["image"] == {"bytes": encode(), "path": None}
    assert dataset.convert(*dataset[0]).columns == {"solution": "(B)", "choices": ["1", "2"], "task": "Count"}
    with pytest.raises(RowError, match="cannot be decoded"):
        dataset.convert(*dataset[1])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("max_samples", [None, 2])
def test_text_files(tmp_path: Path, suffix: str, max_samples: int | None) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text('question,solution\n"2, or 3?",α\nb,2\nc,3\n')
    else:
        write_json_lines(path, [{"question": q, "solution": s} for q, s in [("2, or 3?", "α"), ("b", "2"), ("c", "3")]])
    dataset = load_rows(str(path), max_samples=max_samples)
    assert (len(dataset), dataset.schema) == (max_samples or 3, "question")
    row = dataset.convert(*dataset[0])
    assert (row.question, row.columns) == ("2, or 3?", {"solution": "α"})


def test_conversations_in_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(33))
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    record = {
        "prompt": [{"role": "user", "content": parts}],
        "images": [str(tmp_path / "a.jpg")],
        "solution": "x",
    }
    dataset = load_rows(write_json_lines(tmp_path / "chat.jsonl", [record, record]))
    row = dataset.convert(*dataset[1])
    assert row.messages == record["prompt"]
    assert [image.width for image in row.images] == [33]
    assert row.columns == {"solution": "x", "images": row.images}


def test_folder_of_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = sat_records(6)
    write_sat(tmp_path / "train-00000-of-00002.parquet", records[:3])
    write_sat(tmp_path / "train-00001-of-00002.parquet", records[3:])
    write_sat(tmp_path / "test-00000-of-00001.parquet", records[:1])
    assert [raw["question"] for _, raw in map(load_rows(str(tmp_path)).__getitem__, range(6))] == [
        record["question"] for record in records
    ]
    assert len(load_rows(str(tmp_path), max_samples=4)) == 4
    assert len(load_rows(str(tmp_path), split="test")) == 1
    monkeypatch.chdir(tmp_path)
    assert len(load_rows(".", split="test")) == 1
    with pytest.raises(ValueError, match=r"has no split 'val', only .*train"):
        load_rows(str(tmp_path), split="val")


def test_saved_to_disk(tmp_path: Path) -> None:
    records = datasets.Dataset.from_list(sat_records(4))
    records.save_to_disk(str(tmp_path / "one"))
    assert len(load_rows(str(tmp_path / "one"))) == 4
    assert len(load_rows(str(tmp_path / "one"), max_samples=3)) == 3
    assert len(load_rows(str(tmp_path / "one"), max_samples=9)) == 4
    datasets.DatasetDict({"train": records, "val": records.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert len(load_rows(str(tmp_path / "two"), split="val")) == 1
    with pytest.raises(ValueError, match="has no split 'test', only train, val"):
        load_rows(str(tmp_path / "two"), split="test")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "SAT_train.parquet"
    for count in (3, 5):
        write_sat(path, sat_records(count))
        assert len(load_rows(str(path))) == count
        assert len(load_rows(str(path), max_samples=4)) == min(4, count)


def test_max_samples_stops_before_what_lies_behind(tmp_path: Path) -> None:
    path = Path(write_sat(tmp_path / "SAT_train.parquet", sat_records(64), row_group_size=16))
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 64] = bytes(64)
    path.write_bytes(bytes(damaged))
    dataset = load_rows(str(path), max_samples=32)
    assert [raw["question"] for _, raw in (dataset[i] for i in range(32))] == [f"Question {i}?" for i in range(32)]
    with pytest.raises(ValueError, match=r"SAT_train\.parquet' cannot be read"):
        load_rows(str(path), max_samples=33)
    with pytest.raises(ValueError, match=r"SAT_train\.parquet' cannot be read"):
        load_rows(str(path))


def test_a_single_row_group_is_read_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        for batch in whole(self, *args, **kwargs):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    path = write_sat(tmp_path / "SAT_train.parquet", sat_records(2000))
    assert pq.ParquetFile(path).num_row_groups == 1
    assert len(load_rows(path, max_samples=40)) == 40
    assert sum(read) <= 40 + 2 * loading.BATCH_ROWS  # the second: a look whether there is a row at all


def test_rows_stay_on_disk(tmp_path: Path) -> None:
    dataset = load_rows(write_sat(tmp_path / "SAT_train.parquet", sat_records(3)), max_samples=2)
    assert dataset.records.cache_files
    assert len(pickle.dumps(dataset)) < 10_000


def test_single_image_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_sat(tmp_path / "SAT_train.parquet", sat_records(9, images=2))
    assert len(load_rows(path)) == 9
    with caplog.at_level("INFO"):
        dataset = load_rows(path, single_image_only=True, max_samples=6)
    assert "left out 2 of 6 rows: several images" in caplog.text
    assert [raw["question"][-2] for _, raw in (dataset[i] for i in range(4))] == ["1", "2", "4", "5"]
    assert [index for index, _ in (dataset[i] for i in range(4))] == [0, 1, 2, 3]


@pytest.mark.parametrize("max_samples", [0, -1])
def test_bad_max_samples(max_samples: int) -> None:
    with pytest.raises(ValueError, match=f"max_samples={max_samples} must be at least 1"):
        load_rows("SAT", max_samples=max_samples)


@pytest.mark.parametrize("name", ["missing.parquet", "./missing", "~/missing", "/no/such/folder"])
def test_missing_file(name: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset_name='{name}': no such file or folder \(/"):
        load_rows(name)


def test_unknown_file_type(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"has no known file type: use \.parquet"):
        load_rows(str(tmp_path / "rows.txt"))


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be read: .*doesn't contain any data files"):
        load_rows(str(tmp_path / "empty"))


def test_broken_files(tmp_path: Path) -> None:
    for name in ("broken.parquet", "broken.json"):
        (tmp_path / name).write_text('{"question": nonsense')
        with pytest.raises(ValueError, match=rf"{name}' cannot be read: [^\n]*$"):
            load_rows(str(tmp_path / name))


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SAT_train.parquet' has no rows"):
        load_rows(write_sat(tmp_path / "SAT_train.parquet", []))


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows: the file is empty"):
        load_rows(write_json_lines(tmp_path / "rows.jsonl", []))


def test_no_rows_left(tmp_path: Path) -> None:
    path = write_sat(tmp_path / "SAT_train.parquet", sat_records(1, images=2))
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(path, single_image_only=True)


def test_wrong_columns(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"question": "q", "answers": ["a", "b"]}])
    with pytest.raises(
        ValueError, match=r"rows\.jsonl' has the columns question, answers, which fit no schema"
    ) as info:
        load_rows(path)
    assert "sat: answers, correct_answer, image_bytes, question, question_type;" in str(info.value)
    assert "cvbench: answer, choices, image, prompt, task;" in str(info.value)
    assert "chat: prompt; messages: messages; question: question, solution; problem: problem, solution;" in str(
        info.value
    )
    assert "answer: answer, question" in str(info.value)


@pytest.mark.parametrize("name", ["SAT", "CV-Bench", "someone/something"])
def test_hub_out_of_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(path: str, name: str | None) -> None:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach {path}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match="is neither a local file or folder nor reachable on the hub: ") as info:
        load_rows(name)
    assert f"dataset_name={name!r}" in str(info.value)
    assert "\n" not in str(info.value)
    assert asked == [{"SAT": "array/SAT", "CV-Bench": "nyu-visionx/CV-Bench"}.get(name, name)]


def test_hub_aliases_know_their_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(cvbench_records(3), schema=CVBENCH_SCHEMA), path)
    local = datasets.load_dataset_builder

    def on_the_hub(path: str, name: str | None) -> Any:
        assert path == "nyu-visionx/CV-Bench"
        return local(str(tmp_path), name=name)

    monkeypatch.setattr(datasets, "load_dataset_builder", on_the_hub)
    assert len(load_rows("CV-Bench")) == 3
    with pytest.raises(ValueError, match="has no split 'val', only test"):
        load_rows("CV-Bench", split="val")


@pytest.mark.parametrize("as_folder", [False, True])
def test_pictures_beside_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_folder: bool) -> None:
    folder = tmp_path / "set"
    (folder / "pics").mkdir(parents=True)
    (folder / "pics" / "0.jpg").write_bytes(encode(33))
    records = [
        {"question": "?", "solution": "1", "image": {"path": "pics/0.jpg"}},
        {"question": "?", "solution": "1", "image": {"path": "pics/1.jpg"}},
    ]
    path = write_json_lines(folder / "train.jsonl", records)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = load_rows(str(folder) if as_folder else path)
    assert [image.width for image in rows.convert(*rows[0]).images] == [33]
    with pytest.raises(RowError, match=r"image file 'pics/1\.jpg' does not exist"):
        rows.convert(*rows[1])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_rows_without_their_picture_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures: list[str | None] = ["a.jpg", None, "a.jpg", None]
    records = [{"question": "?", "solution": "1", "image": picture} for picture in pictures]
    load_rows(write_json_lines(tmp_path / "rows.jsonl", records))
    (line,) = warnings(caplog)
    assert "2 of 4 rows have no picture in image, the first is row 1" in line


@pytest.mark.parametrize("max_samples", [None, 3])
def test_training_and_scoring_on_the_same_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, max_samples: int | None
) -> None:
    train = load_rows(write_sat(tmp_path / "train.parquet", sat_records(5)))
    other = load_rows(write_sat(tmp_path / "other.parquet", sat_records(6)))
    (tmp_path / "copy.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    warn_of_shared_rows(train, other)
    assert not warnings(caplog)
    for held_out in ("train.parquet", "copy.parquet"):
        warn_of_shared_rows(train, load_rows(str(tmp_path / held_out), max_samples=max_samples))
        (line,) = warnings(caplog)
        assert "come from the same file" in line
        caplog.clear()


def test_splits_of_one_folder_are_different_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sat(tmp_path / "train-00000-of-00001.parquet", sat_records(5))
    write_sat(tmp_path / "test-00000-of-00001.parquet", sat_records(4))
    train, test = (load_rows(str(tmp_path), split=split) for split in ("train", "test"))
    warn_of_shared_rows(train, test)
    assert not warnings(caplog)
    datasets.Dataset.from_list(sat_records(4)).save_to_disk(str(tmp_path / "saved"))
    saved = load_rows(str(tmp_path / "saved"))
    warn_of_shared_rows(saved, load_rows(str(tmp_path / "saved"), max_samples=2))
    assert len(warnings(caplog)) == 1
