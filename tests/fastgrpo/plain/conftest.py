"""Tiny models and prompts for the plain engine and update."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model.load import Processing, load_policy, load_processing
from fastgrpo.types import Prompt


@pytest.fixture(scope="module")
def processing(tiny_model_dir: Path) -> Processing:
    return load_processing(str(tiny_model_dir))


@pytest.fixture(scope="module")
def shared_vlm(tiny_model_dir: Path) -> Any:
    return sharpened(load_policy(str(tiny_model_dir)))


@pytest.fixture
def vlm(shared_vlm: Any) -> Any:
    return copy.deepcopy(shared_vlm)


def sharpened(model: Any) -> Any:
    """Larger weights: a fresh model's distributions are nearly uniform and forget the context."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if "embed_tokens" in name else 6)
    return model.eval()


def picture(width: int, height: int, colour: str) -> Image.Image:
    image = Image.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, width // 2, height // 3))
    return image


ROWS = {
    "one image": Row(3, [picture(112, 84, "red")], "How many cubes are there?"),
    "two images": Row(
        5, [picture(84, 140, "blue"), picture(56, 56, "green")], "Which picture is darker, and why is it?"
    ),
    "no image": Row(8, [], "Is two more than one?"),
}


@pytest.fixture(scope="module")
def prompts(processing: Processing) -> dict[str, Prompt]:
    builder = PromptBuilder(processing.tokenizer, processing.image_processor)
    return {name: builder.build(row) for name, row in ROWS.items()}


TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(params=["qwen2", "llama"])
def text_model(request: pytest.FixtureRequest, processing: Processing) -> Any:
    torch.manual_seed(0)
    vocabulary = len(processing.tokenizer)
    return sharpened(
        Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **TEXT))
        if request.param == "qwen2"
        else LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **TEXT))
    )


@pytest.fixture
def text_prompts(processing: Processing) -> list[Prompt]:
    builder = PromptBuilder(processing.tokenizer, None)
    texts = ["Is it?", "How many of them are there in all?", "Why?"]
    return [builder.build(Row(i, [], text)) for i, text in enumerate(texts)]
