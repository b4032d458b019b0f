"""Loads a trained model for use: what `fastgrpo eval` and `fastgrpo generate` share."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.cli.console import say
from fastgrpo.cli.options import Parser, at_least

if TYPE_CHECKING:
    import torch

    from fastgrpo.data.prompts import PromptBuilder
    from fastgrpo.types import Engine


@dataclass(frozen=True)
class Inference:
    """One model's engine and prompt builder."""

    engine: Engine
    builder: PromptBuilder
    prompts: dict[str, Any]
    """How it is asked: `prompt_mode` and `prompt_template`."""


PROMPTS = {"prompt_mode": ("base", "instruct"), "prompt_template": ("paper", "answer", "direct")}
"""How a model may be asked."""
MODEL_HELP = "hub id or folder, of a model or of adapters"


def add_model_options(parser: Parser) -> None:
    """Adds the options of a model, its prompts and its device."""
    helps = "as in the model's training, else base", "as in its training, else paper; direct: none"
    for (name, known), text in zip(PROMPTS.items(), helps, strict=True):
        parser.add_argument(f"--{name}", choices=known, help=text)
    parser.add_argument("--max_pixels", type=at_least(1), help="largest area of a picture, height × width")
    parser.add_argument("--min_pixels", type=at_least(1), help="least area of a picture, height × width")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    parser.add_argument("--device", help="cuda, cpu …; a GPU if there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def load_inference(options: Namespace, max_rows: int) -> Inference:
    """Loads the model that the options name, merged with its adapters, and says how it will be asked.

    Args:
        options: of `add_model_options`.
        max_rows: most answers drawn at a time.

    Raises:
        ValueError: a model, device or dtype that cannot be used.
    """
    from fastgrpo.data.prompts import PromptBuilder
    from fastgrpo.model.load import load_merged, load_processing
    from fastgrpo.plain.engine import PlainEngine
    from fastgrpo.sampler.choice import unsupported
    from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions

    if not options.model:
        raise ValueError("the model's name is empty: name a folder or hub id")
    device = usable_device(options.device)
    processing = load_processing(options.model, options.min_pixels, options.max_pixels, options.trust_remote_code)
    model = load_merged(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code).to(device)
    engine: Engine
    if reason := unsupported(model):
        say(f"transformers' generate is used, slower: the sampler cannot run this model, {reason}")
        engine = PlainEngine(model, processing.tokenizer, max_batch=max_rows)
    else:
        engine = SamplerEngine(model, processing.tokenizer, options=SamplerOptions(max_rows=max_rows))
    engine.sync()
    prompts = prompts_of(options)
    builder = PromptBuilder(
        processing.tokenizer,
        processing.image_processor,
        family=processing.family,
        mode=prompts["prompt_mode"],
        template=prompts["prompt_template"],
    )
    return Inference(engine, builder, prompts)


def usable_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU if there is one.

    Raises:
        ValueError: it cannot be used here.
    """
    import torch

    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"--device {name!r} cannot be used here: {error}") from None


def run_settings(model: str) -> Path | None:
    """settings.json of the run that a folder holds, or of the run that a checkpoint-N folder lies in."""
    folder = Path(model)
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((place / "settings.json" for place in places if (place / "settings.json").is_file()), None)


def prompts_of(options: Namespace) -> dict[str, Any]:
    """Prompt mode and template: from the options, else of the run that trained the model, else the paper's."""
    from fastgrpo.cli.chat_models import chat_warning

    prompts: dict[str, Any] = {"prompt_mode": "base", "prompt_template": "paper"}
    if file := run_settings(options.model):
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}. Mend it, or move it away.") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{file} holds no JSON object. Mend it, or move it away.")
        prompts |= {name: settings[name] for name in prompts if name in settings}
        for name, known in PROMPTS.items():
            if prompts[name] not in known:
                raise ValueError(f"{file}: {name}={prompts[name]!r} is not valid: use one of {', '.join(known)}.")
    prompts |= {name: getattr(options, name) for name in prompts if getattr(options, name) is not None}
    is_told = prompts["prompt_mode"] == "base" or prompts["prompt_template"] == "direct"
    template = f", template {prompts['prompt_template']}" if is_told else ""
    say(f"questions are asked in {prompts['prompt_mode']} mode{template}")
    if warning := chat_warning(options.model, prompts["prompt_mode"]):
        say(warning)
    return prompts
