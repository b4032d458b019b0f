"""What every form of a picture decodes to; what cannot be decoded is the row's fault and says why."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastgrpo.data.images import decode_image, decode_images, make_thumbnail
from fastgrpo.types import RowError


def encode(size: tuple[int, int] = (40, 30), colour: str = "red", format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=format, **options)
    return buffer.getvalue()


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def test_decode_image_takes_every_form(tmp_path: Path) -> None:
    data = encode(format="PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for value in (data, bytearray(data), path, str(path), Image.open(path), {"bytes": data, "path": None}):
        image = decode_image(value)
        assert (image.mode, image.size) == ("RGB", (40, 30))
    assert decode_image({"bytes": None, "path": str(path)}).size == (40, 30)
    assert decode_images(data)[0].size == (40, 30)
    assert decode_images(None) == []


def test_decode_image_converts_to_rgb() -> None:
    for mode in ("L", "RGBA", "P", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, format="PNG")
        assert decode_image(buffer.getvalue()).mode == "RGB"


def test_decode_image_turns_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    assert decode_image(encode((40, 30), exif=exif)).size == (30, 40)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "image is missing"),
        ({"bytes": None, "path": None}, "image is missing"),
        ("no/such/file.png", "image file 'no/such/file.png' does not exist"),
        (3, "image is a int; wanted encoded bytes, a file's path"),
        ("a" * 5000, "image 'aaa.{0,80}\\.\\.\\.' is neither a file nor a picture in base64"),
        ("pictures/" + "a" * 5000 + ".png", "image file 'pictures/a.{0,80}\\.\\.\\.' does not exist"),
        ("val/00000000000000000000000000000139123", "is neither a file nor a picture in base64"),
        ("data:image/png;base64,AAAA", "is neither a file nor a picture in base64"),
        ("data:image/svg+xml,<svg/>", "data URI without base64"),
        ("https://example.com/a.png", "is the URL 'https://example.com/a.png': download it"),
        (np.zeros((3, 40, 30), "uint8"), "cannot be decoded: TypeError"),
        (np.zeros((40, 30, 3), "float32"), "cannot be decoded: TypeError"),
        (np.zeros((40, 30), "float32"), r"pixels of 32 bits \(mode F\)"),
        (np.zeros((40, 30), "int32"), r"pixels of 32 bits \(mode I\)"),
    ],
)
def test_decode_image_names_what_is_wrong(value: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        decode_image(value)


def test_decode_image_refuses_a_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RowError, match="DecompressionBombError"):
        decode_image(encode((40, 30)))


def test_thumbnail_shows_pictures_side_by_side() -> None:
    images = [Image.new("RGB", (600, 448), "red"), Image.new("RGB", (50, 100), "blue")]
    thumbnail = Image.open(io.BytesIO(make_thumbnail(images)))
    assert thumbnail.format == "JPEG"
    assert thumbnail.size == (300 + 50, 224)
    left, right, below = (thumbnail.getpixel(place) for place in ((150, 112), (325, 50), (325, 200)))
    assert left[0] > 200 > 100 > left[2]
    assert right[2] > 200 > 100 > right[0]
    assert min(below) > 240
    assert images[0].size == (600, 448)


CLEAR = {
    "RGBA": Image.new("RGBA", (4, 4), (0, 0, 0, 0)),
    "LA": Image.new("LA", (4, 4), (0, 0)),
    "PA": Image.new("PA", (4, 4), (0, 0)),
}


@pytest.mark.parametrize("mode", CLEAR)
def test_transparency_is_laid_on_white(mode: str) -> None:
    assert decode_image(CLEAR[mode]).getpixel((0, 0)) == (255, 255, 255)


def test_a_drawing_on_a_transparent_ground_is_seen() -> None:
    drawing = np.zeros((56, 56, 4), "uint8")
    drawing[10:30, 20:24, 3] = 255
    drawing[40, 40, 3] = 51  # a fifth of black
    seen = np.asarray(decode_image(Image.fromarray(drawing)))
    assert seen[0, 0].tolist() == [255] * 3
    assert seen[15, 21].tolist() == [0] * 3
    assert seen[40, 40].tolist() == [204] * 3
    assert np.array_equal(seen, np.asarray(decode_image(drawing)))


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (Image.new("L", (4, 4), 7), 7),
        (Image.new("RGB", (4, 4), (1, 2, 3)), (1, 2, 3)),
        (Image.new("1", (4, 4), 0), 0),
        (Image.fromarray(np.full((4, 4), 700, "uint16")), 700),
    ],
    ids=["L", "RGB", "1", "I;16"],
)
def test_a_colour_that_a_png_calls_transparent(image: Image.Image, transparency: Any) -> None:
    assert decode_image(saved(image, transparency=transparency)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_entry(format: str) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 1), 1)
    seen = decode_image(saved(image, format, transparency=0))
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", None])
def test_greys_of_16_bits_are_scaled(format: str | None) -> None:
    greys = np.arange(16, dtype="uint16").reshape(4, 4) * 4369  # 0 … 65535
    value = greys if format is None else saved(Image.fromarray(greys), format)
    assert np.asarray(decode_image(value))[..., 0].ravel().tolist() == list(range(0, 256, 17))


def test_arrays() -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), "uint8")
    assert np.array_equal(np.asarray(decode_image(values)), values)
    for grey in (values[..., 0], values[..., :1]):
        assert np.array_equal(np.asarray(decode_image(grey))[..., 2], values[..., 0])
    assert [image.size for image in decode_images(values)] == [(40, 30)]
    assert [image.size for image in decode_images([values, values])] == [(40, 30)] * 2


def test_pictures_in_base64() -> None:
    data = encode(format="PNG")
    plain = base64.b64encode(data).decode()
    web_safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for value in (plain, web_safe, lines, f"data:image/png;base64,{plain}", {"bytes": plain, "path": None}):
        assert decode_image(value).size == (40, 30)


def test_relative_paths_start_in_the_data_sets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, width in (("set", 3), ("work", 5)):
        (tmp_path / folder / "pics").mkdir(parents=True)
        (tmp_path / folder / "pics" / "0.png").write_bytes(encode((width, 2), format="PNG"))
    monkeypatch.chdir(tmp_path / "work")
    own = [tmp_path / "set"]
    assert decode_image("pics/0.png").width == 5
    assert decode_image("pics/0.png", own).width == 3
    assert decode_image({"bytes": None, "path": "pics/0.png"}, own).width == 3
    assert decode_image(str(tmp_path / "set" / "pics" / "0.png"), own).width == 3


def test_pictures_lie_in_the_data_sets_folder_or_where_the_user_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("set", "private"):
        (tmp_path / folder).mkdir()
    (tmp_path / "private" / "me.png").write_bytes(encode((7, 2), format="PNG"))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "private" / "me.png")
    monkeypatch.chdir(tmp_path / "private")
    own = [tmp_path / "set"]
    for path in (str(tmp_path / "private" / "me.png"), "../private/me.png", "link.png"):
        with pytest.raises(RowError, match=r"lies outside the data set's folder: name its folder in --picture_folders"):
            decode_image(path, own)
        assert decode_image(path, [*own, tmp_path / "private"]).width == 7
    with pytest.raises(RowError, match=r"'me\.png' does not exist"):  # the working directory is no place of the set's
        decode_image("me.png", own)


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    eps = saved(Image.new("RGB", (4, 4), "red"), "EPS")
    with pytest.raises(RowError, match="its format is unknown, or none of PNG, JPEG"):
        decode_image(eps)
    with pytest.raises(RowError, match="image is of the format EPS: save it as PNG or JPEG"):
        decode_image(Image.open(io.BytesIO(eps)))
    assert not started.exists()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_are_decoded(format: str) -> None:
    assert decode_image(encode(format=format)).size == (40, 30)


def test_a_picture_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    wide = saved(Image.new("1", (1 << 14, (1 << 12) + 1)))
    assert len(wide) < 20_000
    with pytest.raises(RowError, match="16384 × 4097 pixels, more than 67,108,864: make it smaller"):
        decode_image(wide)
