"""Prompts of families that cut pictures into tiles, through transformers' own processors."""

from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tile_tokenizer import model_for, tile_tokenizer
from tiny_families import PROCESSORS, image_processor, tiny_config

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model.families import family_of
from fastgrpo.types import RowError

PICTURES = [Image.effect_noise(size, 60).convert("RGB") for size in ((60, 40), (28, 28), (40, 70), (30, 200))]


def make_builder(name: str, mode: Any = "base") -> PromptBuilder:
    family = family_of(tiny_config(name))
    return PromptBuilder(tile_tokenizer(family), image_processor(name), family=family, mode=mode)


def joint_processor(name: str, builder: PromptBuilder) -> Any:
    """transformers' own for text and pictures together, of the families for which it needs no torchvision."""
    parts = {"image_processor": builder.image_processor, "tokenizer": builder.tokenizer}
    style: Any = builder.family.style
    if name.startswith("LLaVA"):
        kind = transformers.LlavaProcessor if name == "LLaVA" else transformers.LlavaNextProcessor
        return kind(**parts, patch_size=7, num_additional_image_tokens=1, vision_feature_select_strategy="default")
    if name == "Idefics3":
        return transformers.Idefics3Processor(**parts, image_seq_len=style.per_tile)
    return transformers.Gemma3Processor(**parts, image_seq_length=style.per_tile)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "Idefics3", "Gemma 3 with pictures"])
def test_prompts_are_those_of_the_joint_processor(name: str, count: int) -> None:
    builder = make_builder(name, "instruct")
    prompt = builder.build(Row(0, PICTURES[:count], "Which is wide?"))
    processor = joint_processor(name, builder)
    question = {"type": "text", "text": builder.instruct_prompt.format(question="Which is wide?")}
    asked = [{"role": "user", "content": [*[{"type": "image"}] * count, question]}]
    text = builder.tokenizer.apply_chat_template(asked, tokenize=False)
    theirs = processor(images=PICTURES[:count], text=text, return_tensors="pt", add_special_tokens=False)
    assert prompt.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert prompt.pixel_values is not None
    if theirs["pixel_values"].ndim == 4:
        assert torch.equal(prompt.pixel_values, theirs["pixel_values"])
    elif name == "Idefics3":
        assert torch.equal(prompt.pixel_values, theirs["pixel_values"][0])
    else:
        pairs = zip(prompt.image_grid_thw[:, 0].tolist(), theirs["pixel_values"], strict=True)
        assert torch.equal(prompt.pixel_values, torch.cat([tiles[:n] for n, tiles in pairs]))
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))
    assert len(set(prompt.image_digests)) == count


@pytest.mark.parametrize("mode", ["base", "instruct"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_fit_the_model(name: str, mode: str) -> None:
    """A count of placeholders that is not the tower's ends a forward pass."""
    builder = make_builder(name, mode)
    model = model_for(name, builder.tokenizer)
    for count in range(len(PICTURES) + 1):
        prompt = builder.build(Row(0, PICTURES[:count], "Which is wide?"))
        assert "Which is wide?" in builder.tokenizer.decode(prompt.input_ids)
        inputs = {} if not count else builder.family.style.inputs(prompt.pixel_values, prompt.image_grid_thw)
        with torch.no_grad():
            model(input_ids=prompt.input_ids[None], **inputs)


PLACES = {
    "InternVL": "<img><IMG_CONTEXT>{7}</img>",
    "Gemma 3 with pictures": "\n\n<start_of_image><image_soft_token>{4}<end_of_image>\n\n",
    "SmolVLM": (
        "<fake_token_around_image><row_1_col_1><image>{4}<fake_token_around_image><row_1_col_2><image>{4}\n"
        "<fake_token_around_image><row_2_col_1><image>{4}<fake_token_around_image><row_2_col_2><image>{4}\n\n"
        "<fake_token_around_image><global-img><image>{4}<fake_token_around_image>"
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_markers(name: str) -> None:
    """The base mode's are the family's own; a finished prompt keeps those it has."""
    builder = make_builder(name)
    token = builder.family.image_token
    assert token is not None
    place = PLACES[name].replace(f"{token}{{7}}", token * 28).replace(f"{token}{{4}}", token * 4)
    asked = builder.build(Row(0, PICTURES[:1], "What?"))
    assert builder.tokenizer.decode(asked.input_ids).startswith(place + "A conversation")
    for written in dict.fromkeys([builder.family.template_token or token, builder.family.image_place]):
        finished = builder.build(Row(0, PICTURES[:1], messages=f"Look: {written}What?"))
        assert builder.tokenizer.decode(finished.input_ids) == f"Look: {place}What?"


def test_places_and_pictures_must_be_as_many() -> None:
    for name in PLACES:
        builder = make_builder(name)
        with pytest.raises(RowError, match="1 image places for 2 images"):
            builder.build(Row(0, PICTURES[:2], messages=f"{builder.family.image_place}What?"))


def test_texts_that_a_template_leaves_out_are_passed_as_parts() -> None:
    builder = make_builder("LLaVA", "instruct")
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "No."}]
    assert builder.render(messages, complete=True) == "user: One? assistant: No. "


def test_a_picture_that_cannot_be_cut() -> None:
    def broken(**_: Any) -> Any:
        raise ValueError("too narrow")

    builder = make_builder("SmolVLM")
    builder.image_processor = broken
    with pytest.raises(RowError, match="too narrow"):
        builder.build(Row(0, PICTURES[:1], "What?"))
