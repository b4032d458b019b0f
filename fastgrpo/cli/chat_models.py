"""Whether a model says of itself that it was tuned for chat.

A chat template does not tell: Qwen's base models have one.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from fastgrpo.model.adapters import adapter_base

WORDS = re.compile(r"(?<![a-z])(instruct|chat|it|assistant)(?![a-z])", re.IGNORECASE)
"""In names such as Qwen2-VL-2B-Instruct and gemma-3-4b-it."""


def says_chat(name_or_path: str) -> bool:
    """Whether the model's name, or its card's title or tags, says instruct or chat. Looks at local files alone.

    Args:
        name_or_path: a folder or hub id; of adapters, whose base counts too.
    """
    base = adapter_base(name_or_path)
    return any(map(_says_chat, filter(None, (name_or_path, base))))


def chat_warning(name_or_path: str, prompt_mode: str) -> str | None:
    """A line for whoever asks a chat model in base mode."""
    if prompt_mode != "base" or not says_chat(name_or_path):
        return None
    return f"warning: {name_or_path} looks like a chat model, but is asked in base mode: pass --prompt_mode instruct"


def _says_chat(name_or_path: str) -> bool:
    folder = Path(name_or_path)
    if WORDS.search(folder.name):
        return True
    try:
        # Of a model on the hub, what was downloaded: names there tell nearly always.
        file = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(name_or_path, "README.md")
        if not isinstance(file, str | Path) or not Path(file).is_file():
            return False
        card = ModelCard(Path(file).read_text(errors="replace"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):
        return False
    title = next((line for line in card.text.splitlines() if line.startswith("# ")), "")
    return any(WORDS.search(text) for text in (title, *(card.data.to_dict().get("tags") or [])))
