import io
from collections import Counter

import pytest
from PIL import Image

from fastgrpo.data.sat import REQUIRED_COLUMNS, convert_sat
from fastgrpo.types import RowError


def encode(size: tuple[int, int] = (40, 30), colour: str = "red", format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=format, **options)
    return buffer.getvalue()


def record(**changes: object) -> dict[str, object]:
    return {
        "image_bytes": [encode()],
        "question": "Which way did the camera turn?",
        "answers": ["left", "right", "it did not turn"],
        "question_type": "action_sequence",
        "correct_answer": "left",
    } | changes


def test_question_names_the_shuffled_options() -> None:
    row = convert_sat(record(), row_id=7, seed=3)
    first, second, third = row.columns["choices"]
    assert set(record()) == REQUIRED_COLUMNS
    assert row.question == (
        "Answer in natural language. Which way did the camera turn? "
        f"Choose between the following options: {first}, {second} or {third}"
    )
    assert sorted(row.columns["choices"]) == ["it did not turn", "left", "right"]
    assert row.columns["solution"] == "left"
    assert row.columns["task"] == "action_sequence"
    assert row.row_id == 7
    assert row.messages is None
    assert [image.size for image in row.images] == [(40, 30)]


def test_two_options_are_joined_by_or() -> None:
    row = convert_sat(record(answers=["left", "right"]), row_id=0)
    assert row.question is not None
    assert row.question.endswith((": left or right", ": right or left"))


def test_two_images_and_unicode() -> None:
    raw = record(image_bytes=[encode((8, 8)), encode((9, 9))], answers=["gauche ←", "右"], correct_answer="右")
    row = convert_sat(raw, row_id=0)
    assert [image.width for image in row.images] == [8, 9]
    assert row.columns["solution"] == "右"


def test_shuffle_depends_on_seed_and_row_alone() -> None:
    raw = record()
    orders = [tuple(convert_sat(raw, row_id=i, seed=5).columns["choices"]) for i in range(40)]
    assert orders == [tuple(convert_sat(raw, row_id=i, seed=5).columns["choices"]) for i in range(40)]
    assert orders != [tuple(convert_sat(raw, row_id=i, seed=6).columns["choices"]) for i in range(40)]
    assert len(set(orders)) == 6
    assert raw["answers"] == ["left", "right", "it did not turn"]  # the record is left as it was


def test_shuffle_is_the_same_in_every_process() -> None:
    row = convert_sat(record(), row_id=12, seed=34)
    assert row.columns["choices"] == [
        "it did not turn",
        "left",
        "right",
    ]


def test_gold_answer_is_uniform_over_places() -> None:
    raw = record()
    places = Counter(row.columns["choices"].index("left") for row in (convert_sat(raw, row_id=i) for i in range(1500)))
    # 500 expected at each place, standard deviation 18
    assert all(abs(places[place] - 500) < 75 for place in range(3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"correct_answer": "up"}, "correct_answer 'up' is not among the answers"),
        ({"correct_answer": None}, "correct_answer is None"),
        ({"answers": []}, "answers holds 0 options"),
        ({"answers": None}, "answers holds 0 options"),
        ({"answers": ["left"]}, "answers holds 1 options"),
        ({"answers": ["left", " "]}, "answers is .*; wanted a text or a number for each option"),
        ({"answers": ["left", None]}, "answers is .*; wanted a text or a number for each option"),
        ({"answers": ["left", "Left "]}, "answers holds an option twice"),
        ({"question": "  "}, "question is '  '"),
        ({"question_type": None}, "question_type is None"),
        ({"image_bytes": []}, "image_bytes is empty"),
        ({"image_bytes": None}, "image_bytes is empty"),
        ({"image_bytes": [b""]}, "image 1 of 1: image is missing"),
        ({"image_bytes": [encode(), b"not a picture"]}, "image 2 of 2: image cannot be decoded"),
        ({"image_bytes": [encode((300, 300))[:-400]]}, "image 1 of 1: image cannot be decoded.*truncated"),
        ({"image_bytes": [encode((300, 300), format="PNG")[:-40]]}, "image 1 of 1: image cannot be decoded"),
    ],
)
def test_bad_records(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_sat(record(**changes), row_id=0)


def test_options_and_golds_may_be_numbers() -> None:
    row = convert_sat(record(answers=[2, 3], correct_answer=3), row_id=0)
    assert sorted(row.columns["choices"]) == ["2", "3"]
    assert row.columns["solution"] == "3"
