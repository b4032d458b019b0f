"""Whatever holds records becomes rows: which schema, which pictures, which golds."""

from typing import Any

import pytest
from PIL import Image
from torch.utils.data import Dataset

from fastgrpo.data.row_dataset import RowDataset, as_rows, warn_of_shared_rows
from fastgrpo.types import RowError

datasets = pytest.importorskip("datasets")


class Squares(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": f"{index} squared is", "solution": str(index**2)}


def test_as_rows_wraps_what_a_user_has() -> None:
    listed = [{"prompt": "a", "image": Image.new("RGB", (20, 10))}, {"prompt": "b", "image": None}]
    for given in (listed, datasets.Dataset.from_list(listed, features=image_features())):
        dataset = as_rows(given)
        assert dataset.schema == "chat"
        assert len(dataset) == 2
        assert [image.size for image in dataset.convert(*dataset[0]).images] == [(20, 10)]
        assert dataset.convert(*dataset[1]).images == []
        assert as_rows(dataset) is dataset
    squares = as_rows(Squares())
    assert squares[2] == (2, {"prompt": "2 squared is", "solution": "4"})


def image_features() -> datasets.Features:
    return datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})


def test_as_rows_leaves_nested_pictures_encoded() -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    records = datasets.Dataset.from_list([{"prompt": "a", "images": [{"bytes": b"x", "path": None}]}], features)
    dataset = as_rows(records)
    assert dataset[0][1]["images"] == [{"bytes": b"x", "path": None}]
    with pytest.raises(RowError, match="image 1 of 1: image cannot be decoded"):
        dataset.convert(*dataset[0])


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        ([], "the data set has no rows"),
        (iter([{"prompt": "a"}]), "list_iterator without length or index"),
        (["a", "b"], "holds str records; wanted dicts"),
        ([{"text": "a"}], "the data set has the columns text, which fit no schema"),
    ],
)
def test_as_rows_refuses(dataset: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_rows(dataset)


def test_as_rows_refuses_a_dict_of_splits() -> None:
    with pytest.raises(TypeError, match=r"must be a `Dataset` .* dict of splits \['train'\]: pass one of them"):
        as_rows({"train": [{"prompt": "a"}]})


def test_row_dataset_is_a_torch_data_set() -> None:
    assert isinstance(as_rows(Squares()), RowDataset)
    assert isinstance(as_rows(Squares()), Dataset)


def test_as_rows_seed() -> None:
    records = [
        {
            "image_bytes": [Image.new("RGB", (4, 4))],
            "question": "Which?",
            "answers": ["left", "right"],
            "question_type": "other",
            "correct_answer": "left",
        }
    ]
    choices = [as_rows(records, seed).convert(0, records[0]).columns["choices"] for seed in range(20)]
    assert ["left", "right"] in choices
    assert ["right", "left"] in choices


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("kind", ["list", "datasets", "selected"])
def test_rows_without_their_picture_are_reported(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.new("RGB", (4, 4))
    records = [{"prompt": "a", "image": picture if i % 3 else None, "level": None} for i in range(40)]
    given: Any = records
    if kind != "list":
        features = datasets.Features(image_features() | {"level": datasets.Value("int64")})
        given = datasets.Dataset.from_list(records, features=features)
    if kind == "selected":
        given = given.select(range(1, 21))
    rows = as_rows(given, name="train_dataset")
    count, first = (6, 2) if kind == "selected" else (14, 0)
    expected = f"train_dataset: {count} of {len(rows)} rows have no picture in image, the first is row {first}."
    (line,) = warnings(caplog)
    assert line.startswith(expected)


def test_rows_that_have_their_pictures_and_text_rows_are_not(caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.new("RGB", (4, 4))
    as_rows([{"prompt": "a"}, {"prompt": "b"}])
    as_rows([{"prompt": "a", "images": [picture]}, {"prompt": "b", "images": []}])
    as_rows([{"prompt": "a", "image": picture, "images": None}, {"prompt": "b", "image": None, "images": [picture]}])
    as_rows(datasets.Dataset.from_list([{"prompt": "a", "image": picture}] * 2, features=image_features()))
    assert not warnings(caplog)


def test_the_same_object_for_training_and_scoring(caplog: pytest.LogCaptureFixture) -> None:
    records = [{"prompt": "a"}]
    warn_of_shared_rows(as_rows(records), as_rows(list(records)))
    assert not warnings(caplog)
    warn_of_shared_rows(as_rows(records).with_checked_golds(), as_rows(records))
    assert len(warnings(caplog)) == 1


def test_golds_are_checked_where_asked() -> None:
    rows = as_rows(
        [
            {"question": "?", "solution": [3]},
            {"question": "?", "solution": {"x": 1}},
            {"question": "?", "solution": "E", "choices": [1, 2, 3, 4]},
            {"question": "?", "solution": None},
        ]
    )
    checked = rows.with_checked_golds()
    assert checked.convert(*checked[0]).columns == {"solution": [3]}, "reward functions get the column as it is"
    assert checked.convert(*checked[3]).columns == {"solution": None}
    with pytest.raises(RowError, match=r"solution is \{'x': 1\}; wanted one text or number"):
        checked.convert(*checked[1])
    with pytest.raises(RowError, match="solution 'E' is not a letter of the 4 choices"):
        checked.convert(*checked[2])
    assert [rows.convert(*rows[i]).columns["solution"] for i in (1, 2)] == [{"x": 1}, "E"]
