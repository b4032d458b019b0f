"""Prompts of families that cut pictures into tiles, through transformers' own image processors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, GotOcr2ImageProcessorPil, PreTrainedTokenizerFast

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model.families import INTERNVL, LLAVA

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ TOKEN if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


def make_builder(family: Any, image_processor: Any, mode: str = "base") -> PromptBuilder:
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in (family.image_token, *family.image_markers) if t])
    template = TEMPLATE.replace("TOKEN", repr(family.image_token))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)
    return PromptBuilder(tokenizer, image_processor, family=replace(family, tile_places=4), mode=mode)


@pytest.mark.parametrize("mode", ["base", "instruct"])
def test_llava(mode: str) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    builder = make_builder(LLAVA, processor, mode)
    prompt = builder.build(Row(0, [Image.new("RGB", (60, 40)), Image.new("RGB", (28, 28), "red")], "Which is red?"))
    assert prompt.pixel_values is not None
    assert prompt.pixel_values.shape == (2, 3, 28, 28)
    assert prompt.image_grid_thw.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert int((prompt.input_ids == builder.image_token_id).sum()) == 8
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))
    assert len(set(prompt.image_digests)) == 2


@pytest.mark.parametrize("mode", ["base", "instruct"])
def test_internvl_has_its_markers_around_all_tiles_of_a_picture(mode: str) -> None:
    processor = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6)
    builder = make_builder(INTERNVL, processor, mode)
    prompt = builder.build(Row(0, [Image.new("RGB", (56, 28)), Image.new("RGB", (28, 28))], "Which is wide?"))
    assert prompt.image_grid_thw.tolist() == [[3, 1, 1], [1, 1, 1]]  # two tiles and the whole
    assert prompt.pixel_values.shape == (4, 3, 28, 28)
    text = builder.tokenizer.decode(prompt.input_ids)
    assert f"<img>{'<IMG_CONTEXT>' * 12}</img>" in text
    assert f"<img>{'<IMG_CONTEXT>' * 4}</img>" in text
