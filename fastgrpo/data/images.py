"""Pictures as data sets hold them, decoded to what an image processor would see: RGB, upright, laid on white."""

import base64
import binascii
import io
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgrpo.settings.given import is_out_of_memory
from fastgrpo.types import RowError

THUMBNAIL_SIZE = (896, 224)
"""Largest width and height of one picture in a thumbnail, in pixels."""

SHORTEST_BASE64 = 36
"""Characters: no encoded picture has fewer than 26 bytes."""

WANTED = "wanted encoded bytes, a file's path, base64, a data URI, a PIL image or an array of uint8 or uint16"


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO", "DIB")
"""What is decoded. Others are not needed, and some of Pillow's start programs (EPS: Ghostscript)."""

MAX_PIXELS = 1 << 26
"""Largest picture, width × height (8192 × 8192), looked up before anything is decoded: a file of 500 KB can hold one
that takes gigabytes. Models see far less."""

Folders = Sequence[Path] | None
"""Where pictures may lie; None: anywhere."""


def decode_image(value: Any, folders: Folders = None) -> Image.Image:
    """Decodes one picture completely, turned upright by its EXIF orientation, as RGB.

    Transparency is laid on white, as transformers' image processors do. Greys of 16 bits are scaled to 8.

    Args:
        value: encoded bytes, a file's path, base64, a data URI, a PIL image, an array ([H, W] or [H, W, channels],
            uint8; or [H, W] uint16), or the {"bytes", "path"} record of an image column.
        folders: where files may lie, links followed; a relative path starts in the first of them that has the file.
            None, for rows that the caller made: anywhere, and relative paths start in the working directory.

    Raises:
        RowError: nothing there, no such file, one outside of `folders`, a format that is none of `FORMATS`, more than
            `MAX_PIXELS`, bytes that cannot be decoded to the last line, or pixels of 32 bits, of which nobody says how
            bright the brightest is.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, memoryview | bytearray):
        value = bytes(value)
    if value is None or (isinstance(value, str | bytes) and not value.strip()):
        raise RowError("image is missing")
    source = _find(value, folders) if isinstance(value, str | os.PathLike) else value
    if not isinstance(source, Path | bytes | Image.Image | np.ndarray):
        raise RowError(f"image is a {type(value).__name__}; {WANTED}")
    try:
        return _to_rgb(_open(source))
    except RowError:
        raise
    except UnidentifiedImageError as error:  # PIL's own message holds an address in memory
        if isinstance(value, str) and isinstance(source, bytes):
            raise RowError(f"image {_short(value)} is neither a file nor a picture in base64") from error
        raise RowError("image cannot be decoded: its format is unknown, or none of " + ", ".join(FORMATS)) from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        if is_out_of_memory(error):
            raise
        raise RowError(f"image cannot be decoded: {type(error).__name__}: {error}") from error


def _find(value: str | os.PathLike[str], folders: Folders) -> Path | bytes:
    """The file that a text names, or the bytes that it spells."""
    text = os.fspath(value)
    if text.startswith("data:"):
        header, _, content = text.partition(",")
        if not header.endswith(";base64"):
            raise RowError(f"image is a data URI without base64 ({_short(header)}): encode it so")
        return _from_base64(content)
    if text.startswith(("http://", "https://")):
        raise RowError(f"image is the URL {_short(text)}: download it and give the file's path")
    outside = False
    for start in (Path(),) if folders is None else folders:
        if "\0" not in text and os.path.isfile(start / text):  # Path.is_file raises for a name that is too long
            if folders is None or _is_below(start / text, folders):
                return start / text
            outside = True
    if outside:
        raise RowError(
            f"image file {_short(text)} lies outside the data set's folder: name its folder in --picture_folders "
            "(eval: --pictures) if you trust the data set with it"
        )
    if len(text) >= SHORTEST_BASE64 and "." not in text:
        return _from_base64(text)
    raise RowError(f"image file {_short(text)} does not exist")


def _is_below(file: Path, folders: Sequence[Path]) -> bool:
    found = Path(os.path.realpath(file))
    return any(found.is_relative_to(os.path.realpath(folder)) for folder in folders)


def _from_base64(text: str) -> bytes:
    content = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"image {_short(text)} is neither a file nor a picture in base64") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _open(source: Path | bytes | Image.Image | np.ndarray[Any, Any]) -> Image.Image:
    if isinstance(source, np.ndarray):
        return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[-1] == 1 else source)
    image = source if isinstance(source, Image.Image) else Image.open(_readable(source), formats=_formats())
    if image.format is not None and image.format not in FORMATS:
        raise RowError(f"image is of the format {image.format}: save it as PNG or JPEG")
    if image.width * image.height > MAX_PIXELS:
        raise RowError(f"image has {image.width} × {image.height} pixels, more than {MAX_PIXELS:,}: make it smaller")
    image.load()  # `open` reads the header alone: a truncated file only shows here
    return image


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _readable(source: Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _to_rgb(image: Image.Image) -> Image.Image:
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if has_16_bits:
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise RowError(
            f"image has pixels of 32 bits (mode {image.mode}), whose range nobody states: save it with 8 or 16 bits"
        )
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which PIL's own conversion cuts off at 255."""
    values = np.asarray(image).astype(np.int64)
    grey = (values + 128) // 257
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def decode_images(values: Any, folders: Folders = None) -> list[Image.Image]:
    """Decodes a list of pictures, a single picture, or None (no pictures).

    Raises:
        RowError: as `decode_image`; the reason says which of several pictures is bad.
    """
    if values is None:
        return []
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return [decode_image(values, folders)]
    images = []
    for index, value in enumerate(values):
        try:
            images.append(decode_image(value, folders))
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
