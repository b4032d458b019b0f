"""Rows of CV-Bench (https://huggingface.co/datasets/nyu-visionx/CV-Bench): multiple choice on one picture."""

from pathlib import Path
from typing import Any

from fastgrpo.data.images import decode_image
from fastgrpo.data.rows import Row, require_letter, require_options, require_text

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
    solution = require_letter(raw, "answer", choices)
    return Row(
        row_id=row_id,
        images=[decode_image(raw["image"], folder)],
        question=question,
        columns={"solution": solution, "choices": choices, "task": require_text(raw, "task")},
    )
