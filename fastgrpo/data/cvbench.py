"""Rows of CV-Bench (https://huggingface.co/datasets/nyu-visionx/CV-Bench): multiple choice on one picture."""

import re
import string
from pathlib import Path
from typing import Any

from fastgrpo.data.images import decode_image
from fastgrpo.data.rows import Row, require_options, require_text
from fastgrpo.types import RowError

REQUIRED_COLUMNS = frozenset({"image", "prompt", "choices", "answer", "task"})


def convert_cvbench(raw: dict[str, Any], row_id: int, folder: Path | None = None) -> Row:
    """Turns a CV-Bench record into a row. The question is `prompt`, which already lists the lettered choices.

    Args:
        raw: `image`, `prompt`, `choices` (option texts), `answer` ("(A)"), `task` (Count, Relation, Depth,
            Distance).
        folder: where relative paths of pictures start.

    Returns:
        A question row with columns `solution` (the letter form "(A)"), `choices` and `task`.

    Raises:
        RowError: a bad picture, no prompt, unusable choices, or an answer that is no letter of a choice.
    """
    question = require_text(raw, "prompt")
    choices = require_options(raw, "choices")
    answer = require_text(raw, "answer")
    letter = re.fullmatch(r"\(?([A-Z])\)?", answer)
    if letter is None or string.ascii_uppercase.index(letter[1]) >= len(choices):
        raise RowError(f"answer {answer!r} is not a letter of the {len(choices)} choices")
    return Row(
        row_id=row_id,
        images=[decode_image(raw["image"], folder)],
        question=question,
        columns={"solution": f"({letter[1]})", "choices": choices, "task": require_text(raw, "task")},
    )
