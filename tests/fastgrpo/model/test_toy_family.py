"""CONTRIBUTING's toy family, added as it says."""

import re
from pathlib import Path

import pytest
import tiny_families
import transformers
from family_parity import sampler_error, steps_error, update_errors
from tile_tokenizer import tile_tokenizer

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model import families

RECORD, ROW = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(), re.DOTALL)


class ToyVLConfig(transformers.LlavaConfig):
    model_type = "toy_vl"


class ToyVLForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    config_class = ToyVLConfig


def test_the_toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (ToyVLConfig, ToyVLForConditionalGeneration):
        monkeypatch.setattr(transformers, kind.__name__, kind, raising=False)
    added = dict(vars(families))
    exec(RECORD, added)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, added["TOY_VL"]))
    for table in ("VISION_FAMILIES", "OWN", "PROCESSORS"):
        monkeypatch.setattr(tiny_families, table, dict(getattr(tiny_families, table)))
    exec(ROW, vars(tiny_families))
    model, prompts = tiny_families.family("Toy-VL")
    assert sampler_error(model, prompts) < 1e-4
    assert max(update_errors(model, prompts)) < 1e-5
    assert steps_error(model, prompts) < 1e-3
    family = families.family_of(model.config)
    builder = PromptBuilder(tile_tokenizer(family), tiny_families.image_processor("Toy-VL"), family=family)
    picture = tiny_families.Image.new("RGB", (60, 40), "red")
    assert "<pics>" + "<pic>" * 16 + "</pics>A conv" in builder.tokenizer.decode(
        builder.build(Row(0, [picture], "Which?")).input_ids
    )
