"""What `fastgrpo doctor MODEL` says: which path sampling and update take for a model, from its config alone."""

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fastgrpo.model.families import family_of, is_multimodal, mrope_sections
from fastgrpo.model.load import load_config, load_processing, takes_images
from fastgrpo.model.picture_styles import Tiles
from fastgrpo.sampler.choice import is_packed, unsupported
from fastgrpo.settings.given import given
from fastgrpo.update.packed_forward import require_packed_support


class Row(NamedTuple):
    """One line of the table."""

    part: str
    found: str
    consequence: str


def examine_model(name: str, trust_remote_code: bool = False) -> list[Row]:
    """Loads no weights.

    Args:
        name: a folder or hub id, of a model or of adapters.

    Raises:
        ValueError: there is no such model.
    """
    config = load_config(name, trust_remote_code)
    kind = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    with torch.device("meta"), given(f"{name!r}: no model can be made of its config.json"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return [
        Row("model", f"{type(model).__name__}, {billions:.2f} B parameters", ""),
        _sampling(model),
        _update(model),
        _pictures(model),
        Row("positions", "M-RoPE" if mrope_sections(model) else "1-D", ""),
        *_prompts(name, trust_remote_code),
    ]


def _sampling(model: Any) -> Row:
    if is_packed(model):
        return Row("sampling", "packed decoder", "")
    if reason := unsupported(model):
        costs = "every completion processes its prompt, and depends on more than its own seed; no ZeRO-3"
        return Row("sampling", "transformers' generate", f"{reason}: {costs}")
    return Row("sampling", "generic decoder", "its own layers over the paged cache: no fused weights")


def _update(model: Any) -> Row:
    try:
        require_packed_support(model)
    except ValueError as error:
        return Row("update", "padded batches", f"{error} Every completion processes its prompt.")
    return Row("update", "packed, shared prompts", "")


def _pictures(model: Any) -> Row:
    family = family_of(model.config)
    if not is_multimodal(model):
        return Row("pictures", "none", "a text model")
    if family.image_token is None:
        return Row("pictures", "none", f"how {family.name} models take them is not known: text rows only")
    place, notes = family.image_place.strip(), []
    if isinstance(style := family.style, Tiles):
        place = style.written_out(place, family.image_token, style.smallest())
        notes = [f"{style.per_tile} placeholders a tile"]
    if family.whole_pictures:
        notes.append("a picture's tokens see all of it")
    return Row("pictures", place, "; ".join([*notes, "what a frozen tower sees is cached"]))


def _prompts(name: str, trust_remote_code: bool) -> list[Row]:
    try:
        tokenizer = load_processing(name, trust_remote_code=trust_remote_code).tokenizer
    except ValueError as error:
        return [Row("prompts", "no tokenizer", str(error))]
    first = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"][:-1])
    template = "chat template" if tokenizer.chat_template else "no chat template"
    return [
        Row("prompts", template, "" if tokenizer.chat_template else "prompt_mode base alone"),
        Row("first tokens", " ".join(first) or "none", "in front of plain prompts"),
    ]
