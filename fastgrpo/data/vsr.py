"""Rows of VSR (https://huggingface.co/datasets/cambridgeltl/vsr_random): is a statement about a picture true?"""

from typing import Any

from fastgrpo.data.images import Folders, decode_image
from fastgrpo.data.rows import Row, require_text
from fastgrpo.types import RowError

REQUIRED_COLUMNS = frozenset({"image", "caption", "label"})
CHOICES = ("True", "False")
QUESTION = (
    "Is the following statement about the picture true or false? {caption} Select from the following choices.\n"
    "(A) True\n(B) False"
)


def convert_vsr(raw: dict[str, Any], row_id: int, folders: Folders = None) -> Row:
    """Turns a VSR record into a true/false question.

    Args:
        raw: `image` (its file's name: the published rows hold no pictures, which are COCO's, at `image_link`),
            `caption`, `label` (1: true, 0: false).
        folders: where pictures may lie, and relative paths start; None: anywhere.

    Returns:
        A question row with columns `solution` ("(A)" or "(B)") and `choices`.

    Raises:
        RowError: a bad or missing picture, no caption, or another label.
    """
    caption = require_text(raw, "caption")
    label = str(raw["label"]).strip()
    if label not in ("0", "1"):
        raise RowError(f"label is {raw['label']!r}; wanted 0 or 1")
    try:
        image = decode_image(raw["image"], folders)
    except RowError as error:
        raise RowError(f"{error} (published at {raw.get('image_link')})") from error
    columns = {"solution": "(A)" if label == "1" else "(B)", "choices": list(CHOICES)}
    return Row(row_id=row_id, images=[image], question=QUESTION.format(caption=caption), columns=columns)
