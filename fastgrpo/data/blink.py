"""Rows of BLINK (https://huggingface.co/datasets/BLINK-Benchmark/BLINK): multiple choice on one to four pictures."""

import re
from typing import Any

from fastgrpo.data.images import Folders, decode_image
from fastgrpo.data.rows import Row, require_letter, require_options, require_text
from fastgrpo.types import RowError

IMAGE_COLUMNS = ("image_1", "image_2", "image_3", "image_4")
REQUIRED_COLUMNS = frozenset({"idx", "image_1", "prompt", "choices", "answer"})


def convert_blink(raw: dict[str, Any], row_id: int, folders: Folders = None) -> Row:
    """Turns a BLINK record into a row. The question is `prompt`, which already lists the lettered choices.

    Args:
        raw: `idx` ("val_Relative_Depth_1", which names the task), `image_1` to `image_4` (null where there are fewer),
            `prompt`, `choices` (option texts), `answer` ("(A)"; hidden in the test split).
        folders: where pictures may lie, and relative paths start; None: anywhere.

    Returns:
        A question row with columns `solution` (the letter form "(A)"), `choices` and `task`.

    Raises:
        RowError: a bad picture or none, no prompt, unusable choices, or an answer that is no letter of a choice.
    """
    choices = require_options(raw, "choices")
    columns = {"solution": require_letter(raw, "answer", choices), "choices": choices, "task": _task(raw)}
    given = [name for name in IMAGE_COLUMNS if name == "image_1" or raw.get(name) is not None]
    images = []
    for name in given:
        try:
            images.append(decode_image(raw.get(name), folders))
        except RowError as error:
            raise RowError(f"{name}: {error}") from error
    return Row(row_id=row_id, images=images, question=require_text(raw, "prompt"), columns=columns)


def _task(raw: dict[str, Any]) -> str:
    found = re.fullmatch(r"(?:val|test)_(.+)_\d+", require_text(raw, "idx"))
    return "all" if found is None else found[1]
