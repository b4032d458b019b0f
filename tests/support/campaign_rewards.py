"""Rewards of campaigns' runs: hashes of the text, so that groups differ within whatever the model says."""

import hashlib
from typing import Any


def varied(completions: list[Any], **_: Any) -> list[float]:
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
