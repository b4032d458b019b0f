"""Rows in the schemas of published benchmarks."""

import io
from typing import Any

from PIL import Image


def picture(kind: str = "PNG", width: int = 40, path: str = "picture.png") -> dict[str, Any]:
    """The {bytes, path} record of an image column."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, 30)).save(buffer, format=kind)
    return {"bytes": buffer.getvalue(), "path": path}


def blink_row(task: str = "Relative_Depth", index: int = 1, **changes: object) -> dict[str, Any]:
    question = "Which point is closer to the camera?"
    return {
        "idx": f"val_{task}_{index}",
        "question": question,
        "image_1": picture(),
        "image_2": None,
        "image_3": None,
        "image_4": None,
        "choices": ["A is closer", "B is closer"],
        "answer": "(B)",
        "prompt": f"{question}\nSelect from the following choices.\n(A) A is closer\n(B) B is closer",
    } | changes


def vsr_row(**changes: object) -> dict[str, Any]:
    link = "http://images.example/1.jpg"
    return {"image": "1.jpg", "image_link": link, "caption": "The cat is on the mat.", "label": 1} | changes


def cvbench_row(**changes: object) -> dict[str, Any]:
    return {
        "task": "Count",
        "image": picture(),
        "question": "How many lamps?",
        "choices": ["2", "1"],
        "answer": "(A)",
        "prompt": "How many lamps?\n(A) 2\n(B) 1",
    } | changes


def sat_row(**changes: object) -> dict[str, Any]:
    return {
        "image_bytes": [picture()["bytes"]],
        "question": "Where is the chair?",
        "answers": ["left", "right"],
        "question_type": "relative",
        "correct_answer": "left",
    } | changes
