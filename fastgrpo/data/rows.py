"""A data set's row once its schema is forgotten: pictures, a question or a conversation, and the gold
columns."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from fastgrpo.types import RowError

THUMBNAIL_SIZE = (896, 224)
"""Largest width and height of one picture in a thumbnail, in pixels."""


@dataclass(frozen=True)
class Row:
    """One row of any schema. Exactly one of `question` and `messages` is set."""

    row_id: int
    """Index of the row in its data set."""
    images: list[Image.Image] = field(default_factory=list)
    """Decoded RGB pictures, in the order of their places in the prompt; empty for a text-only row."""
    question: str | None = None
    """A bare question: the prompt template of the run's mode goes around it."""
    messages: list[dict[str, Any]] | str | None = None
    """A conversation for the model's chat template, or a finished prompt (str) taken as it is."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What reward functions are handed by name: `solution`, `choices`, `task`, and the row's other
    columns."""


def decode_image(value: Any) -> Image.Image:
    """Decodes one picture completely, turned upright by its EXIF orientation, as RGB.

    Args:
        value: encoded bytes, a file's path, a PIL image, or the {"bytes", "path"} record of an image column.

    Raises:
        RowError: nothing there, no such file, or bytes that cannot be decoded to the last line.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, memoryview | bytearray):
        value = bytes(value)
    if value is None or value in (b"", ""):
        raise RowError("image is missing")
    if isinstance(value, str | os.PathLike) and not Path(value).is_file():
        raise RowError(f"image file {str(value)!r} does not exist")
    if not isinstance(value, str | os.PathLike | bytes | Image.Image):
        raise RowError(f"image is a {type(value).__name__}; wanted bytes, a path or a PIL image")
    try:
        image = value if isinstance(value, Image.Image) else Image.open(_source(value))
        image.load()  # `open` reads the header alone: a truncated file only shows here
        return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:  # PIL's own message holds an address in memory
        raise RowError("image cannot be decoded: its format is unknown") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        raise RowError(f"image cannot be decoded: {type(error).__name__}: {error}") from error


def _source(value: str | os.PathLike[str] | bytes) -> Any:
    return io.BytesIO(value) if isinstance(value, bytes) else value


def decode_images(values: Any) -> list[Image.Image]:
    """Decodes a list of pictures, a single picture, or None (no pictures).

    Raises:
        RowError: as `decode_image`; the reason says which of several pictures is bad.
    """
    if values is None:
        return []
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return [decode_image(values)]
    images = []
    for index, value in enumerate(values):
        try:
            images.append(decode_image(value))
        except RowError as error:
            raise RowError(f"image {index + 1} of {len(values)}: {error}") from error
    return images


def make_thumbnail(images: Sequence[Image.Image]) -> bytes:
    """The pictures side by side on white, shrunk to at most 224 px high, as JPEG bytes."""
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail(THUMBNAIL_SIZE)
    width, height = sum(image.width for image in small), max(image.height for image in small)
    canvas = Image.new("RGB", (width, height), "white")
    left = 0
    for image in small:
        canvas.paste(image, (left, 0))
        left += image.width
    buffer = io.BytesIO()
    canvas.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def require_text(raw: dict[str, Any], column: str) -> str:
    """The column's text without outer white space.

    Raises:
        RowError: the value is no string, or blank.
    """
    value = raw.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is {value!r}; wanted a text")
    return value.strip()


def require_options(raw: dict[str, Any], column: str) -> list[str]:
    """The column's option texts, in order, without outer white space.

    Raises:
        RowError: fewer than two options, or one that is no text or blank.
    """
    values = raw.get(column)
    options = [value.strip() for value in values or [] if isinstance(value, str) and value.strip()]
    if len(options) != len(values or []):
        raise RowError(f"{column} holds something that is no text: {values!r}")
    if len(options) < 2:
        raise RowError(f"{column} holds {len(options)} options; wanted at least two")
    return options
