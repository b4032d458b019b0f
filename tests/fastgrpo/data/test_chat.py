import base64
import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgrpo.data.chat import convert_chat
from fastgrpo.types import RowError


def picture(width: int) -> Image.Image:
    return Image.new("RGB", (width, 10))


def widths(images: list[Image.Image]) -> list[int]:
    return [image.width for image in images]


IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_images_go_in_front_of_the_first_user_message() -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And its colour?"},
    ]
    before = copy.deepcopy(prompt)
    raw = {"prompt": prompt, "images": [picture(3), picture(4)], "solution": "red", "level": 2}
    row = convert_chat(raw, row_id=9)
    assert row.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, IMAGE, text("What is this?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And its colour?"},
    ]
    assert widths(row.images) == [3, 4]
    assert row.columns == {"solution": "red", "level": 2, "images": row.images}, "rewards see the pictures decoded"
    assert prompt == before
    assert row.row_id == 9


def test_typed_parts_keep_their_places() -> None:
    content = [text("first"), IMAGE, text("then"), IMAGE]
    row = convert_chat({"prompt": [{"role": "user", "content": content}], "images": [picture(3), picture(4)]}, 0)
    assert row.messages == [{"role": "user", "content": content}]
    assert widths(row.images) == [3, 4]


def test_keys_that_arrow_adds_are_dropped() -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "hi", "image": None}]
    message = {"role": "user", "content": content, "tool_calls": None}
    row = convert_chat({"prompt": [message], "image": picture(3)}, 0)
    assert row.messages == [{"role": "user", "content": [IMAGE, text("hi")]}]


def test_parts_may_carry_their_pictures() -> None:
    content = [{"type": "image", "image": picture(7)}, IMAGE, text("compare")]
    row = convert_chat({"prompt": [{"role": "user", "content": content}], "image": picture(3)}, 0)
    assert row.messages == [{"role": "user", "content": [IMAGE, IMAGE, text("compare")]}]
    assert widths(row.images) == [7, 3]


def test_text_only_conversation_has_string_contents() -> None:
    prompt = [
        {"role": "user", "content": [text("one "), text("two")]},
        {"role": "assistant", "content": "<think>"},
    ]
    row = convert_chat({"prompt": prompt, "image": None}, 0)
    assert row.messages == [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "<think>"},
    ]
    assert row.images == []


def test_plain_text_prompt_is_kept() -> None:
    row = convert_chat({"prompt": "2+2=", "solution": "4", "question": "sum"}, 0)
    assert row.messages == "2+2="
    assert row.question is None
    assert row.columns == {"solution": "4", "question": "sum"}


def test_question_row() -> None:
    row = convert_chat({"question": " How many? ", "image": picture(3), "solution": "4"}, 0)
    assert (row.question, row.messages) == ("How many?", None)
    assert row.columns == {"solution": "4", "image": row.images[0]}
    assert widths(row.images) == [3]


@pytest.mark.parametrize("asked", ["question", "problem"])
@pytest.mark.parametrize("gold", ["solution", "answer"])
def test_names_of_question_and_gold(asked: str, gold: str) -> None:
    row = convert_chat({asked: "How many?", gold: "4"}, 0)
    assert (row.question, row.columns["solution"]) == ("How many?", "4")
    assert convert_chat({asked: "?", "solution": 4, "answer": 5}, 0).columns == {"solution": 4, "answer": 5}


def test_parts_may_name_their_pictures(tmp_path: Path) -> None:
    picture(7).save(tmp_path / "7.png")
    encoded = base64.b64encode((tmp_path / "7.png").read_bytes()).decode()
    content = [
        {"type": "image", "path": "7.png"},
        IMAGE,
        {"type": "image", "base64": encoded},
        {"type": "image", "image": "7.png"},
    ]
    row = convert_chat({"prompt": [{"role": "user", "content": content}], "image": picture(3)}, 0, [tmp_path])
    assert widths(row.images) == [7, 3, 7, 7]


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            {"prompt": [{"role": "user", "content": [text("hi")]}], "image": picture(3)},
            "0 image parts for 1 images",
        ),
        ({"prompt": [{"role": "user", "content": [IMAGE, text("hi")]}]}, "1 image parts for 0 images"),
        (
            {"prompt": [{"role": "system", "content": "hi"}], "image": picture(3)},
            "0 image parts for 1 images",
        ),
        ({"prompt": [{"role": "robot", "content": "hi"}]}, "message 1 is .*; wanted one of the roles"),
        ({"prompt": ["hi"]}, "message 1 is 'hi'"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "message 1 has the part"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "message 1 has the part",
        ),
        ({"prompt": USER, "image": picture(3), "images": [picture(3)]}, "both `image` and `images`"),
        ({"prompt": USER, "images": [b"nonsense"]}, "image 1 of 1: image cannot be decoded"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": b"x"}]}]}, "cannot be decoded"),
        ({"solution": "4"}, "question is None"),
    ],
)
def test_bad_records(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_chat(raw, 0)


def test_message_without_content() -> None:
    row = convert_chat({"prompt": [*USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, 0)
    assert row.messages is not None
    assert row.messages[1] == {"role": "assistant", "tool_calls": [{"name": "f"}], "content": ""}


def prepared(user: str, answer: str = "left", images: Any = ("a",)) -> dict[str, Any]:
    """As VisualThinker's preparation of SAT writes rows."""
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture(3 + i) for i in range(len(images))]}


def test_messages_with_one_question_are_a_bare_question() -> None:
    row = convert_chat(prepared("<image> Answer in natural language. Where? left or right"), row_id=4)
    assert (row.question, row.messages) == ("Answer in natural language. Where? left or right", None)
    assert row.columns == {"solution": "left", "images": row.images}
    assert widths(row.images) == [3]
    assert convert_chat({"messages": prepared("Where?")["messages"]}, row_id=0).images == []


def test_longer_messages_keep_their_turns_and_the_places_of_pictures() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nThis is one, <image> this another."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Which is larger?"},
        {"role": "assistant", "content": [text("The first.")]},
    ]
    row = convert_chat({"messages": messages, "images": [picture(3), picture(4)]}, row_id=0)
    assert row.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, text("This is one,"), IMAGE, text("this another.")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Which is larger?"},
    ]
    assert row.columns == {"solution": "The first.", "images": row.images}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": "Where?"}]}, "wanted a question and the assistant's answer"),
        ({"messages": []}, "wanted a text or a list of messages"),
        (prepared("<image> <image> Where?"), "2 image parts for 1 images"),
        (prepared("<image>"), "wanted a text"),
    ],
)
def test_messages_that_cannot_be_used(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert_chat(record, row_id=0)
