"""Rows of CV-Bench (https://huggingface.co/datasets/nyu-visionx/CV-Bench): multiple choice on one picture."""

from typing import Any

from fastgrpo.data.images import Folders, decode_image
from fastgrpo.data.rows import Row, require_letter, require_options, require_text

REQUIRED_COLUMNS = frozenset({"image", "prompt", "choices", "answer", "task"})


def convert_cvbench(raw: dict[str, Any], row_id: int, folders: Folders = None) -> Row:
    """Turns a CV-Bench record into a row. The question is `prompt`, which already lists the lettered choices.

    Args:
        raw: `image`, `prompt`, `choices` (option texts), `answer` ("(A)"), `task` (Count, Relation, Depth,
            Distance).
        folders: where pictures may lie, and relative paths start; None: anywhere.

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
        images=[decode_image(raw["image"], folders)],
        question=question,
        columns={"solution": solution, "choices": choices, "task": require_text(raw, "task")},
    )
