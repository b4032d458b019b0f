import pytest
from benchmark_rows import blink_row, picture

from fastgrpo.data.blink import REQUIRED_COLUMNS, convert_blink
from fastgrpo.types import RowError


def test_a_row_is_its_prompt_its_letter_and_its_task() -> None:
    row = convert_blink(blink_row(), row_id=7)
    assert set(blink_row()) >= REQUIRED_COLUMNS
    assert (row.row_id, row.question) == (7, blink_row()["prompt"])
    assert row.columns == {"solution": "(B)", "choices": ["A is closer", "B is closer"], "task": "Relative_Depth"}
    assert [image.size for image in row.images] == [(40, 30)]


def test_pictures_come_in_order() -> None:
    row = convert_blink(
        blink_row(image_1=picture(width=40), image_2=picture(width=50), image_3=picture("WEBP", 60)), row_id=0
    )
    assert [image.width for image in row.images] == [40, 50, 60]


@pytest.mark.parametrize(("answer", "solution"), [("(A)", "(A)"), ("B", "(B)"), ("(b)", "(B)"), ("A.", "(A)")])
def test_letters_in_any_usual_form(answer: str, solution: str) -> None:
    assert convert_blink(blink_row(answer=answer), row_id=0).columns["solution"] == solution


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "hidden"}, "answer 'hidden' is not a letter of the 2 choices"),
        ({"answer": "(C)"}, r"answer '\(C\)' is not a letter of the 2 choices"),
        ({"answer": None}, "answer is None"),
        ({"choices": None}, "choices holds 0 options"),
        ({"prompt": " "}, "prompt is ' '"),
        ({"image_1": None}, "image_1: image is missing"),
        ({"image_2": {"bytes": b"nonsense", "path": None}}, "image_2: image cannot be decoded"),
        ({"idx": None}, "idx is None"),
    ],
)
def test_bad_records(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_blink(blink_row(**changes), row_id=0)


def test_a_record_that_names_no_task() -> None:
    assert convert_blink(blink_row(idx="1"), row_id=0).columns["task"] == "all"
