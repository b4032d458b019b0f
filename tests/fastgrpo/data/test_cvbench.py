import io

import pytest
from PIL import Image

from fastgrpo.data.cvbench import REQUIRED_COLUMNS, convert_cvbench
from fastgrpo.types import RowError


def record(**changes: object) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, format="PNG")
    return {
        "idx": 11,
        "type": "2D",
        "task": "Count",
        "image": {"bytes": buffer.getvalue(), "path": None},
        "question": "How many lamps are there?",
        "choices": ["2", "1", "0", "3"],
        "answer": "(C)",
        "prompt": "How many lamps are there? Select from the following choices.\n(A) 2\n(B) 1\n(C) 0\n(D) 3",
        "source": "ADE20K",
    } | changes


def test_prompt_is_the_question_and_the_letter_the_solution() -> None:
    row = convert_cvbench(record(), row_id=4)
    assert set(record()) >= REQUIRED_COLUMNS
    assert row.question == record()["prompt"]
    assert row.columns == {"solution": "(C)", "choices": ["2", "1", "0", "3"], "task": "Count"}
    assert row.row_id == 4
    assert row.images[0].size == (40, 30)


@pytest.mark.parametrize("answer", ["C", "(C)", " (C) "])
def test_letter_form_is_normalised(answer: str) -> None:
    assert convert_cvbench(record(answer=answer), row_id=0).columns["solution"] == "(C)"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "(E)"}, r"answer '\(E\)' is not a letter of the 4 choices"),
        ({"answer": "0"}, "answer '0' is not a letter"),
        ({"answer": None}, "answer is None"),
        ({"choices": []}, "choices holds 0 options"),
        ({"prompt": ""}, "prompt is ''"),
        ({"task": None}, "task is None"),
        ({"image": None}, "image is missing"),
        ({"image": {"bytes": b"nonsense", "path": None}}, "image cannot be decoded"),
    ],
)
def test_bad_records(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_cvbench(record(**changes), row_id=0)
