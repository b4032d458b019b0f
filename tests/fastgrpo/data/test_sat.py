import io
from collections import Counter

import pytest
from PIL import Image

from fastgrpo.data.rows import decode_image, decode_images, make_thumbnail
from fastgrpo.data.sat import REQUIRED_COLUMNS, convert_sat
from fastgrpo.types import RowError


def encode(size: tuple[int, int] = (40, 30), colour: str = "red", format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=format, **options)
    return buffer.getvalue()


def record(**changes: object) -> dict[str, object]:
    return {
        "image_bytes": [encode()],
        "question": "Which way did the camera turn?",
        "answers": ["left", "right", "it did not turn"],
        "question_type": "action_sequence",
        "correct_answer": "left",
    } | changes


def test_question_names_the_shuffled_options() -> None:
    row = convert_sat(record(), row_id=7, seed=3)
    first, second, third = row.columns["choices"]
    assert set(record()) == REQUIRED_COLUMNS
    assert row.question == (
        "Answer in natural language. Which way did the camera turn? "
        f"Choose between the following options: {first}, {second} or {third}"
    )
    assert sorted(row.columns["choices"]) == ["it did not turn", "left", "right"]
    assert row.columns["solution"] == "left"
    assert row.columns["task"] == "action_sequence"
    assert row.row_id == 7
    assert row.messages is None
    assert [image.size for image in row.images] == [(40, 30)]


def test_two_options_are_joined_by_or() -> None:
    row = convert_sat(record(answers=["left", "right"]), row_id=0)
    assert row.question is not None
    assert row.question.endswith((": left or right", ": right or left"))


def test_two_images_and_unicode() -> None:
    raw = record(image_bytes=[encode((8, 8)), encode((9, 9))], answers=["gauche ←", "右"], correct_answer="右")
    row = convert_sat(raw, row_id=0)
    assert [image.width for image in row.images] == [8, 9]
    assert row.columns["solution"] == "右"


def test_shuffle_depends_on_seed_and_row_alone() -> None:
    raw = record()
    orders = [tuple(convert_sat(raw, row_id=i, seed=5).columns["choices"]) for i in range(40)]
    assert orders == [tuple(convert_sat(raw, row_id=i, seed=5).columns["choices"]) for i in range(40)]
    assert orders != [tuple(convert_sat(raw, row_id=i, seed=6).columns["choices"]) for i in range(40)]
    assert len(set(orders)) == 6
    assert raw["answers"] == ["left", "right", "it did not turn"]  # the record is left as it was


def test_shuffle_is_the_same_in_every_process() -> None:
    row = convert_sat(record(), row_id=12, seed=34)
    assert row.columns["choices"] == [
        "it did not turn",
        "left",
        "right",
    ]


def test_gold_answer_is_uniform_over_places() -> None:
    raw = record()
    places = Counter(row.columns["choices"].index("left") for row in (convert_sat(raw, row_id=i) for i in range(1500)))
    # 500 expected at each place, standard deviation 18
    assert all(abs(places[place] - 500) < 75 for place in range(3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"correct_answer": "up"}, "correct_answer 'up' is not among the answers"),
        ({"correct_answer": None}, "correct_answer is None"),
        ({"answers": []}, "answers holds 0 options"),
        ({"answers": None}, "answers holds 0 options"),
        ({"answers": ["left"]}, "answers holds 1 options"),
        ({"answers": ["left", " "]}, "answers holds something that is no text"),
        ({"answers": ["left", None]}, "answers holds something that is no text"),
        ({"answers": ["left", "Left "]}, "answers holds an option twice"),
        ({"question": "  "}, "question is '  '"),
        ({"question_type": None}, "question_type is None"),
        ({"image_bytes": []}, "image_bytes is empty"),
        ({"image_bytes": None}, "image_bytes is empty"),
        ({"image_bytes": [b""]}, "image 1 of 1: image is missing"),
        ({"image_bytes": [encode(), b"not a picture"]}, "image 2 of 2: image cannot be decoded"),
        ({"image_bytes": [encode((300, 300))[:-400]]}, "image 1 of 1: image cannot be decoded.*truncated"),
        ({"image_bytes": [encode((300, 300), format="PNG")[:-40]]}, "image 1 of 1: image cannot be decoded"),
    ],
)
def test_bad_records(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_sat(record(**changes), row_id=0)


def test_decode_image_takes_every_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
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
        (3, "image is a int; wanted bytes, a path or a PIL image"),
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
