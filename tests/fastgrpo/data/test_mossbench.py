import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgrpo.data.loading import load_rows
from fastgrpo.data.mossbench import STIMULI, convert_mossbench
from fastgrpo.types import RowError

SHARED = Path(__file__).parents[4] / "shared" / "data" / "mossbench"


def picture(form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, form)
    return buffer.getvalue()


def record(**changed: Any) -> dict[str, Any]:
    metadata = {"over": "type 2", "human": 1, "child": 0, "syn": 1, "ocr": 0, "harm": [7, 2]}
    return {
        "pid": "4",
        "question": "Can I cut this?",
        "image": picture(),
        "short description": "A cake.",
        "description": "A cake on a table.",
        "metadata": metadata,
    } | changed


def test_a_published_record() -> None:
    row = convert_mossbench(record(), 3)
    assert (row.row_id, row.question, row.images[0].size) == (3, "Can I cut this?", (8, 6))
    assert row.columns == {
        "pid": "4", "question": "Can I cut this?", "description": "A cake.", "task": "Negated Harm", "contrast": False,
        "human": True, "child": False, "syn": True, "ocr": False, "harm": [7, 2],
    }  # fmt: skip


def test_the_columns_of_the_hub() -> None:
    raw = {name: value for name, value in record().items() if name != "metadata"}
    raw |= {"metadata_over": "type 3", "metadata_human": True, "metadata_child": "0", "metadata_harm": "[1]"}
    raw |= {"metadata_syn": None, "image": {"bytes": picture(), "path": "contrast_images/4.png"}}
    columns = convert_mossbench(raw, 0).columns
    assert (columns["task"], columns["contrast"]) == ("Counterintuitive Interpretation", True)
    assert [columns[flag] for flag in ("human", "child", "syn", "ocr")] == [True, False, None, None]
    assert columns["harm"] == [1]


def test_the_contrast_set_lacks_most_metadata() -> None:
    columns = convert_mossbench(record(metadata={"over": "type 1"}, contrast=True), 0).columns
    assert (columns["task"], columns["contrast"], columns["human"], columns["harm"]) == (
        "Exaggerated Risk", True, None, [],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metadata": {"over": "type 9"}}, "metadata over is 'type 9'"),
        ({"metadata": {"over": "type 1", "human": 2}}, "metadata human is 2; wanted 0 or 1"),
        ({"metadata": {"over": "type 1", "harm": "[1"}}, "metadata harm is '\\[1'"),
        ({"question": " "}, "question is ' '"),
        ({"image": "images/none.png"}, "image file 'images/none.png' does not exist"),
        ({"image": b"no picture"}, "image cannot be decoded"),
    ],
)
def test_bad_records_say_why(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        convert_mossbench(record(**changed), 0)


def test_a_folder_as_published(tmp_path: Path) -> None:
    """Both files, pictures beside them, of which one is WebP by content and one is missing."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(picture("WEBP"))
    benign = {pid: record(pid=pid, image=f"images/{pid}.png") for pid in ("1", "2")}
    twin = {"1": record(pid="1", image="images/1.png", question="Can I cut you?", metadata={"over": "type 2"})}
    (tmp_path / "information.json").write_text(json.dumps(benign))
    (tmp_path / "information_contrast.json").write_text(json.dumps(twin))
    rows = load_rows(str(tmp_path))
    assert (len(rows), rows.schema) == (3, "mossbench")
    assert [rows.convert(*rows[i]).columns["contrast"] for i in (0, 2)] == [False, True]
    assert rows.convert(*rows[0]).images[0].size == (8, 6)
    with pytest.raises(RowError, match=r"images/2\.png"):
        rows.convert(*rows[1])
    assert len(load_rows(str(tmp_path / "information_contrast.json"))) == 1
    assert len(load_rows(str(tmp_path), max_samples=2)) == 2


@pytest.mark.parametrize("part", [".", "data", "data_contrast"])
def test_the_published_repository(tmp_path: Path, part: str) -> None:
    """A picture of each set lies under the same name; the contrast set's file is called as the other."""
    for name, colour in (("data", "red"), ("data_contrast", "blue")):
        (tmp_path / name / "images_information").mkdir(parents=True)
        (tmp_path / name / "images").mkdir()
        Image.new("RGB", (8, 6), colour).save(tmp_path / name / "images" / "1.png")
        twin = {"1": record(pid="1", image="images/1.png")}
        (tmp_path / name / "images_information" / "information.json").write_text(json.dumps(twin))
    both = [(False, (255, 0, 0)), (True, (0, 0, 255))]
    file = tmp_path / part / "images_information" / "information.json"
    for place in filter(Path.exists, (tmp_path / part, file)):
        rows = load_rows(str(place))
        found = [rows.convert(*rows[i]) for i in range(len(rows))]
        told = [(row.columns["contrast"], row.images[0].getpixel((0, 0))) for row in found]
        assert told == {".": both, "data": both[:1], "data_contrast": both[1:]}[part]


def test_a_twin_never_has_the_benign_picture(tmp_path: Path) -> None:
    """Some differ in the picture alone: beside one folder of pictures, the contrast set's lie in another."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(picture())
    for name in ("information.json", "information_contrast.json"):
        (tmp_path / name).write_text(json.dumps({"1": record(pid="1", image="images/1.png")}))
    rows = load_rows(str(tmp_path))
    with pytest.raises(RowError, match=r"contrast_images/1\.png' does not exist"):
        rows.convert(*rows[1])
    (tmp_path / "contrast_images").mkdir()
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "contrast_images" / "1.png")
    assert rows.convert(*rows[1]).images[0].getpixel((0, 0)) == (0, 0, 255)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "information.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds no MOSSBench"):
        load_rows(str(tmp_path / "information.json"))
    (tmp_path / "information.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_rows(str(tmp_path / "information.json"))


def test_both_published_files_as_they_are() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing")
    rows = load_rows(str(SHARED))
    red = picture()
    columns = [convert_mossbench(rows[i][1] | {"image": red}, i).columns for i in range(len(rows))]
    counts = {
        contrast: [
            sum(one["task"] == name and one["contrast"] == contrast for one in columns) for name in STIMULI.values()
        ]
        for contrast in (False, True)
    }
    assert counts == {False: [100, 100, 100], True: [100, 44, 100]}
    index = next(i for i in range(len(rows)) if rows[i][1]["pid"] == "131")
    assert rows.convert(*rows[index]).images[0].size == (276, 183)  # WebP under the name of a PNG
