"""Rows of SAT (https://huggingface.co/datasets/array/SAT): spatial questions on one or two pictures."""

import random
from collections.abc import Sequence
from typing import Any

from fastgrpo.data.images import Folders, decode_images
from fastgrpo.data.rows import Row, require_options, require_text
from fastgrpo.scoring.golds import gold_text
from fastgrpo.types import RowError

REQUIRED_COLUMNS = frozenset({"image_bytes", "question", "answers", "question_type", "correct_answer"})


def convert_sat(raw: dict[str, Any], row_id: int, seed: int = 0, folders: Folders = None) -> Row:
    """Turns a SAT record into a row. The question ends with the options, in shuffled order.

    In the published files the gold answer always stands first. The shuffle is seeded with (seed, row_id), so its order
    is the same in every run and on every rank.

    Args:
        raw: `image_bytes` (list of encoded pictures), `question`, `answers` (option texts), `question_type`,
            `correct_answer` (one of `answers`).
        folders: where pictures may lie, and relative paths start; None: anywhere.

    Returns:
        A question row with columns `solution` (the gold option's text), `choices` (options as shown), `task`.

    Raises:
        RowError: a bad picture or none, no question, unusable options, or a gold answer that is not among
            them.
    """
    question = require_text(raw, "question")
    choices = require_options(raw, "answers")
    if len({choice.casefold() for choice in choices}) < len(choices):
        raise RowError(f"answers holds an option twice: {choices}")
    solution = gold_text(raw.get("correct_answer"), "correct_answer")
    if solution not in choices:
        raise RowError(f"correct_answer {solution!r} is not among the answers {choices}")
    random.Random(f"{seed}:{row_id}").shuffle(choices)  # a str seed is hashed by SHA-512, without a salt
    images = decode_images(raw["image_bytes"], folders)
    if not images:
        raise RowError("image_bytes is empty")
    return Row(
        row_id=row_id,
        images=images,
        question=f"Answer in natural language. {question} {_offer(choices)}",
        columns={"solution": solution, "choices": choices, "task": require_text(raw, "question_type")},
    )


def _offer(options: Sequence[str]) -> str:
    return f"Choose between the following options: {', '.join(options[:-1])} or {options[-1]}"
