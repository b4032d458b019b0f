"""Finds the model that a folder of adapters (saved with `use_peft`) belongs to."""

import functools
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.utils.peft_utils import find_adapter_config_file


def adapter_base(name_or_path: str) -> str | None:
    """The base model of the adapters in a folder or hub repository; None if it holds no adapters.

    Raises:
        ValueError: an adapter_config.json that is no JSON or names no base.
    """
    folder = Path(name_or_path)
    file = folder / "adapter_config.json" if folder.exists() else _file_on_hub(name_or_path)
    if file is None or not file.is_file():
        return None
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} names no base_model_name_or_path: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path={base!r} is no model: name the one the adapters belong to")
    return base


def processing_source(name_or_path: str) -> str:
    """Where to load a model's tokenizer and image processor: beside the adapters if both are there, else the base.

    Args:
        name_or_path: a folder or hub id, of a model or of adapters.
    """
    folder = Path(name_or_path)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    has_processor = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    return name_or_path if has_tokenizer and has_processor else adapter_base(name_or_path) or name_or_path


@functools.cache
def _file_on_hub(name: str) -> Path | None:
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None  # a whole model, already downloaded: no need to ask the hub
        file = find_adapter_config_file(name)
    except (OSError, ValueError):
        return None  # loading the model reports what is wrong with the name
    return None if file is None else Path(file)
