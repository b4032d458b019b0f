"""Model text as HTML: escaped, tags and reflective phrases highlighted; pictures as data URIs."""

import base64
import re

from markupsafe import Markup, escape

from fastgrpo.safe_text.inert import inert
from fastgrpo.scoring.reflection import REFLECTION

_TAGS = re.compile(r"(</?(?:think|answer)>)")
_PICTURE = re.compile(r"(?:<\|vision_start\|>)?(?:<\|image_pad\|>)+(?:<\|vision_end\|>)?")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>")
_BASE_QUESTION = re.compile(r"\nUser: (.*?)\nAssistant:", re.DOTALL)
_CHAT_QUESTION = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


def completion_html(text: str, prompt: str = "") -> Markup:
    """A completion as HTML: what the model wrote is escaped and inert, its tags and reflective phrases are marked.

    A prompt that ends in an opening tag (base mode: `<think>`) shows that tag in front, faded: it was not generated.
    """
    opening = re.search(r"<think>\s*$", prompt)
    parts = [Markup('<span class="tag given">&lt;think&gt;</span>')] if opening else []
    inside_answer = False
    for part in _TAGS.split(inert(text)):
        if _TAGS.fullmatch(part):
            inside_answer = part == "<answer>"
            kind = "answer" if "answer" in part else "think"
            parts.append(Markup('<span class="tag {}">{}</span>').format(kind, part))
        elif part:
            marked = _mark_reflections(part)
            parts.append(Markup('<b class="answer">{}</b>').format(marked) if inside_answer else marked)
    return Markup("").join(parts)


def _mark_reflections(text: str) -> Markup:
    end, parts = 0, []
    for match in REFLECTION.finditer(text):
        parts += [escape(text[end : match.start()]), Markup("<mark>{}</mark>").format(match[0])]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def question_of(prompt: str) -> str:
    """The question in a rendered prompt, without the template around it or the places of its pictures."""
    found = _BASE_QUESTION.findall(prompt) or _CHAT_QUESTION.findall(prompt)
    question = found[-1] if found else prompt
    return _SPECIAL.sub("", _PICTURE.sub("", question)).strip()


def picture_uri(thumbnail: object) -> str | None:
    """JPEG or PNG bytes as a data URI; None for anything else."""
    if not isinstance(thumbnail, bytes):
        return None
    kinds = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
    kind = next((kind for magic, kind in kinds.items() if thumbnail.startswith(magic)), None)
    return kind and f"data:image/{kind};base64,{base64.b64encode(thumbnail).decode('ascii')}"
