from pathlib import Path

import pytest
from benchmark_rows import vsr_row
from PIL import Image

from fastgrpo.data.benchmarks import load_benchmark
from fastgrpo.data.vsr import convert_vsr
from fastgrpo.types import RowError

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "vsr" / "random-test-first400.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    Image.new("RGB", (50, 30)).save(tmp_path / "2.png", format="WEBP")
    return tmp_path


@pytest.mark.parametrize(("label", "solution"), [(1, "(A)"), (0, "(B)"), ("1", "(A)"), ("0", "(B)")])
def test_a_statement_becomes_a_question(folder: Path, label: object, solution: str) -> None:
    row = convert_vsr(vsr_row(label=label), row_id=3, folders=[folder])
    assert row.question == (
        "Is the following statement about the picture true or false? The cat is on the mat. "
        "Select from the following choices.\n(A) True\n(B) False"
    )
    assert row.columns == {"solution": solution, "choices": ["True", "False"]}
    assert (row.row_id, row.images[0].size) == (3, (40, 30))


def test_webp_under_another_name(folder: Path) -> None:
    assert convert_vsr(vsr_row(image="2.png"), row_id=0, folders=[folder]).images[0].width == 50


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": 2}, "label is 2; wanted 0 or 1"),
        ({"label": None}, "label is None"),
        ({"caption": ""}, "caption is ''"),
        ({"image": "3.jpg"}, r"image file '3.jpg' does not exist \(published at http://images.example/1.jpg\)"),
    ],
)
def test_bad_records(folder: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_vsr(vsr_row(**changes), row_id=0, folders=[folder])


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs ../shared/data/vsr")
def test_the_published_file(tmp_path: Path) -> None:
    rows = load_benchmark("vsr", str(PUBLISHED), pictures=tmp_path)
    assert (rows.schema, len(rows)) == ("vsr", 400)
    for index in (0, 2, 399):
        _, raw = rows[index]
        Image.new("RGB", (40, 30)).save(tmp_path / raw["image"])
        row = rows.convert(index, raw)
        assert raw["caption"] in row.question
        assert row.columns["solution"] == ("(A)" if raw["label"] else "(B)")
    labels = [rows[i][1]["label"] for i in range(400)]
    assert set(labels) == {0, 1}
