"""Tokens, keys and passwords, left out of whatever is written down: known by a setting's name, and by their look."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
_NAME = re.compile(
    r"(^|[_-])token$|(^|[_-])(api|access|secret|private)[_-]?key$|(secret|password|passwd|credentials?|authorization)$",
    re.IGNORECASE,
)
_OF_TEXT = re.compile(r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|video|audio|vision\w*|start|end|extra)_token$")
"""Names of tokens that a tokenizer has."""
_LOOK = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
OF_ENVIRONMENT = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "COMET_API_KEY"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
"""Variables whose values are hidden wherever they stand."""
SHORTEST = 6
"""Characters: shorter values are hidden by their name alone, since they stand in other texts by chance."""


def is_secret(name: str) -> bool:
    """Whether a setting of this name is a token, a key or a password."""
    return _NAME.search(name) is not None and _OF_TEXT.search(name) is None


def redacted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every secret as `(hidden)`, in nested objects, lists and texts too; nothing else is changed.

    Hidden are texts under a secret's name, wherever else they stand, what looks like a token, and the values of
    `OF_ENVIRONMENT`.
    """
    known = {value for name in OF_ENVIRONMENT if (value := os.environ.get(name)) and len(value) >= SHORTEST}
    known |= set(_secrets(settings))
    longest_first = sorted(known, key=len, reverse=True)
    return {name: _hidden(name, value, longest_first) for name, value in settings.items()}


def _secrets(value: Any, name: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [secret for key, one in value.items() for secret in _secrets(one, str(key))]
    if isinstance(value, list | tuple):
        return [secret for one in value for secret in _secrets(one, name)]
    return [value] if isinstance(value, str) and len(value) >= SHORTEST and is_secret(name) else []


def _hidden(name: str, value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _hidden(str(key), one, known) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(name, one, known) for one in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret(name):
        return HIDDEN
    for secret in known:
        value = value.replace(secret, HIDDEN)
    return _LOOK.sub(HIDDEN, value)
