"""Rows of MOSSBench (https://huggingface.co/datasets/AIcell/MOSSBench): benign questions that look harmful.

Published as two JSON dicts keyed by `pid`, each an `information.json` in `data/images_information` and, with harmful
twins of its questions, in `data_contrast/images_information` (or beside each other, the second as
`information_contrast.json`), and on the hub as the configurations `oversensitivity` and `contrast`. Some twins differ
in their picture alone, and both sets' pictures have the same names.
"""

import json
from pathlib import Path
from typing import Any

from fastgrpo.data.images import Folders, decode_image
from fastgrpo.data.rows import Row, require_text
from fastgrpo.types import RowError

REQUIRED_COLUMNS = frozenset({"pid", "question", "image", "short description"})
BENIGN, CONTRAST = "information.json", "information_contrast.json"
INFORMATION = "images_information"
PICTURES = {False: ("data/images",), True: ("contrast_images", "data_contrast/images")}
"""Whether of the contrast set → where pictures lie that its records say to be in `images`, before that folder."""
STIMULI = {
    "type 1": "Exaggerated Risk",
    "type 2": "Negated Harm",
    "type 3": "Counterintuitive Interpretation",
}
FLAGS = ("human", "child", "syn", "ocr")
"""Metadata that is 0 or 1: a person, a child, a synthetic picture, text in the picture."""


def convert_mossbench(raw: dict[str, Any], row_id: int, folders: Folders = None) -> Row:
    """Turns a MOSSBench record into a row without a gold answer: what counts is whether it is answered at all.

    Args:
        raw: `pid`, `question`, `image`, `short description`, and `metadata` {over, human, child, syn, ocr, harm} or the
            hub's columns `metadata_over`, …; `contrast` where the file that it is from says so.
        folders: where pictures may lie, and relative paths start; None: anywhere.

    Returns:
        A question row with the columns `pid`, `question`, `description`, `task` (the stimulus type's name), `contrast`,
        the flags (True, False, or None where it is not said, as in the contrast set) and `harm` (list of numbers).

    Raises:
        RowError: a bad or missing picture, no question, an unknown stimulus type.
    """
    metadata = raw.get("metadata") or {name.removeprefix("metadata_"): value for name, value in raw.items()}
    over = " ".join(str(metadata.get("over")).split()).casefold()
    if over not in STIMULI:
        raise RowError(f"metadata over is {metadata.get('over')!r}; wanted {', '.join(map(repr, STIMULI))}")
    question = require_text(raw, "question")
    contrast = bool(raw["contrast"]) if "contrast" in raw else "contrast" in _path(raw["image"])
    columns = {
        "pid": str(raw["pid"]),
        "question": question,
        "description": str(raw.get("short description") or ""),
        "task": STIMULI[over],
        "contrast": contrast,
        **{flag: _flag(flag, metadata.get(flag)) for flag in FLAGS},
        "harm": _numbers(metadata.get("harm")),
    }
    image = decode_image(_own_picture(raw["image"], contrast, folders), folders)
    return Row(row_id=row_id, images=[image], question=question, columns=columns)


def _own_picture(image: Any, contrast: bool, folders: Folders) -> Any:
    """Where a picture of `images` lies, if both sets' pictures are there."""
    if not isinstance(image, str) or Path(image).parent.name not in ("images", PICTURES[True][0]):
        return image
    places = [f"{place}/{Path(image).name}" for place in PICTURES[contrast]]
    starts = (Path(),) if folders is None else folders
    return next((place for place in places if any((start / place).is_file() for start in starts)), image)


def published_files(path: Path) -> list[Path]:
    """Those of the two published files that a path is, or that lie in the folder it is."""
    if not path.is_dir():
        candidates = [path] if path.name in (BENIGN, CONTRAST) else []
    else:
        below = ("", INFORMATION, f"data/{INFORMATION}", f"data_contrast/{INFORMATION}")
        candidates = [path / place / name for place in below for name in (BENIGN, CONTRAST)]
    return [file for file in candidates if file.is_file()]


def pictures_start(file: Path) -> Path:
    """The folder that a published file's pictures are named from."""
    folder = file.absolute().parent
    return folder.parent if folder.name == INFORMATION else folder


def read_published(files: list[Path]) -> list[dict[str, Any]]:
    """The records of published files, one after the other.

    Raises:
        ValueError: a file that is no JSON dict of records.
    """
    records = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(record, dict) for record in content.values()):
            raise ValueError(f"{file} holds no MOSSBench: wanted a dict of records by pid")
        contrast = file.name == CONTRAST or "contrast" in pictures_start(file).name
        for pid, record in content.items():
            records.append(dict.fromkeys(REQUIRED_COLUMNS) | {"pid": pid} | record | {"contrast": contrast})
    asked = [[str(record[name]) for name in ("pid", "question", "image")] for record in records]
    benign = [one for one, record in zip(asked, records, strict=True) if not record["contrast"]]
    for one, record in zip(asked, records, strict=True):
        if record["contrast"] and one in benign:  # told apart by the picture alone: never take the benign one's
            record["image"] = f"{PICTURES[True][0]}/{Path(one[2]).name}"
    return records


def _path(image: Any) -> str:
    return str(image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else "")


def _flag(name: str, value: Any) -> bool | None:
    text = str(value).strip().casefold()
    if value is None or text in ("", "nan"):
        return None
    if text not in ("0", "1", "0.0", "1.0", "true", "false"):
        raise RowError(f"metadata {name} is {value!r}; wanted 0 or 1")
    return text in ("1", "1.0", "true")


def _numbers(value: Any) -> list[int]:
    """A list of whole numbers, or the text of one, as the hub has it."""
    if value is None or str(value).strip() in ("", "nan"):
        return []
    try:
        found = json.loads(value) if isinstance(value, str) else value
        return [int(number) for number in (found if isinstance(found, list | tuple) else [found])]
    except (ValueError, TypeError) as error:
        raise RowError(f"metadata harm is {value!r}; wanted a list of numbers") from error
