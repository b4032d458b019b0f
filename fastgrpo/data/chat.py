"""Conversation rows as TRL takes them (`prompt` or `messages`, optional `image` or `images`) and bare question rows."""

from typing import Any

from PIL import Image

from fastgrpo.data.images import Folders, decode_image, decode_images
from fastgrpo.data.rows import Row, require_text
from fastgrpo.types import RowError

ROLES = ("system", "user", "assistant", "tool")
QUESTION_COLUMNS = ("question", "problem")
IMAGE_COLUMNS = ("image", "images")
PICTURE_KEYS = ("image", "path", "base64")
IMAGE_PLACE = "<image>"
"""A picture's place in the text of `messages`, as in files that LLaVA's and VisualThinker's preparation writes."""


def convert_chat(raw: dict[str, Any], row_id: int, folders: Folders = None) -> Row:
    """Turns a record with a `prompt` (messages or text), `messages` or a question into a row; other columns are kept.

    Those of pictures hold them decoded.

    Of a question, the column is `question` or `problem`, the gold answer's `solution` or `answer`; the row's columns
    have it as `solution`.

    `messages` end with the assistant's answer, which becomes `solution`; a single question before it is a bare
    question, put into the prompt of the run's mode like any other.

    Messages follow TRL's conventions: where contents are plain strings, the row's images go in front of the
    first user message; where contents are lists of parts, every {"type": "image"} part without a picture of
    its own takes the next of the row's images. Such a part may also carry its picture, as `image`, `path` or
    `base64`. The records are left unchanged.

    Args:
        raw: `prompt` (list of role/content messages, or a finished text), `messages` or a question; `image` or
            `images`, or neither for a text-only row; anything else.
        folders: where pictures may lie, and relative paths start; None: anywhere.

    Raises:
        RowError: neither prompt nor question, a malformed message, messages without an answer, a bad picture, or image
            parts and images that differ in number.
    """
    if raw.get("image") is not None and raw.get("images") is not None:
        raise RowError("the row has both `image` and `images`; wanted one of them")
    given = raw["images"] if raw.get("images") is not None else raw.get("image")
    images = decode_images(given, folders)
    columns = {name: value for name, value in raw.items() if name != "prompt"}
    for name in IMAGE_COLUMNS:
        if raw.get(name) is not None:
            columns[name] = images if isinstance(given, list | tuple) else images[0]
    prompt = raw.get("prompt")
    if prompt is None and raw.get("messages") is not None:
        return _from_messages(raw["messages"], row_id, images, columns, folders)
    if prompt is None:
        asked = next((name for name in QUESTION_COLUMNS if raw.get(name) is not None), QUESTION_COLUMNS[0])
        columns.pop(asked, None)
        if "solution" not in columns and "answer" in columns:
            columns["solution"] = columns["answer"]
        return Row(row_id=row_id, images=images, question=require_text(raw, asked), columns=columns)
    if isinstance(prompt, str):
        return Row(row_id=row_id, images=images, messages=prompt, columns=columns)
    messages, images = _prepare_messages(prompt, images, folders)
    return Row(row_id=row_id, images=images, messages=messages, columns=columns)


def _from_messages(
    given: Any, row_id: int, images: list[Image.Image], columns: dict[str, Any], folders: Folders
) -> Row:
    marked = [_with_places(message) for message in given] if images and isinstance(given, list) else given
    messages, images = _prepare_messages(marked, images, folders, have_places=marked != given)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RowError(f"messages end with {messages[-1]!r}; wanted a question and the assistant's answer")
    *asked, answer = messages
    columns = {name: value for name, value in columns.items() if name != "messages"}
    columns["solution"] = message_text(answer).strip()
    if [message["role"] for message in asked] == ["user"]:
        question = require_text({"messages": message_text(asked[0])}, "messages")
        return Row(row_id=row_id, images=images, question=question, columns=columns)
    return Row(row_id=row_id, images=images, messages=asked, columns=columns)


def _with_places(message: Any) -> Any:
    """The message with every `IMAGE_PLACE` of its text as an image part."""
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or IMAGE_PLACE not in text:
        return message
    first, *others = (piece.strip() for piece in text.split(IMAGE_PLACE))
    parts = [{"type": "text", "text": first}]
    for piece in others:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return message | {"content": [part for part in parts if part.get("text") != ""]}


def message_text(message: dict[str, Any]) -> str:
    """The texts of a message, a line each."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content)


def _prepare_messages(
    prompt: Any, images: list[Image.Image], folders: Folders, *, have_places: bool = False
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Messages whose pictures became {"type": "image"} parts, and the pictures in the parts' order.

    Unless they `have_places` already, all pictures go in front of the first user message that is a string.
    """
    if not isinstance(prompt, list) or not prompt:
        raise RowError(f"prompt is {prompt!r}; wanted a text or a list of messages")
    messages: list[dict[str, Any]] = []
    carried: list[Any] = []  # per image part: its own picture, or None
    loose_images = [] if have_places else [{"type": "image"} for _ in images]
    for index, message in enumerate(prompt):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RowError(f"message {index + 1} is {message!r}; wanted one of the roles {', '.join(ROLES)}")
        parts = _parts_of(message, index)
        if message["role"] == "user" and isinstance(message.get("content"), str):
            parts, loose_images = [*loose_images, *parts], []
        carried += [_own_picture(part) for part in parts if part["type"] == "image"]
        messages.append({key: value for key, value in message.items() if value is not None} | _content(parts))
    num_places = sum(picture is None for picture in carried)
    if num_places != len(images):
        raise RowError(f"the messages have {num_places} image parts for {len(images)} images")
    loose = iter(images)
    return messages, [next(loose) if picture is None else decode_image(picture, folders) for picture in carried]


def _own_picture(part: dict[str, Any]) -> Any:
    return next((part[key] for key in PICTURE_KEYS if part.get(key) is not None), None)


def _parts_of(message: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """The message's content as a list of typed parts; empty where there is none, as beside tool calls."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = content or []
    if not isinstance(parts, list):
        raise RowError(f"message {index + 1} has the content {content!r}; wanted a text or a list of parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise RowError(f"message {index + 1} has the part {part!r}; wanted a text or an image")
    return parts


def _content(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The message's `content`: a plain string if it is text alone, as text-only templates want it.

    Parts are written anew: records read from Arrow carry every part's keys, and templates take a part with
    the key `image` for an image.
    """
    if all(part["type"] == "text" for part in parts):
        return {"content": "".join(part["text"] for part in parts)}
    return {
        "content": [
            {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image"} for part in parts
        ]
    }
