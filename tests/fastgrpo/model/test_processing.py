"""A processor or tokenizer that users pass is checked as one from the model's folder is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, Qwen2Config, VipLlavaConfig

from fastgrpo.model.families import QWEN2, QWEN2_VL
from fastgrpo.model.load import load_policy, load_processing, processing_from

OURS = "{{ 'the processor has its own' }}"


@pytest.fixture(scope="module")
def parts(tiny_model_dir: Path) -> Any:
    return load_processing(str(tiny_model_dir))


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_model_dir)


def processor(parts: Any, **changes: Any) -> Any:
    given = {"tokenizer": parts.tokenizer, "image_processor": parts.image_processor, "chat_template": None}
    return SimpleNamespace(**given | changes)


def test_a_processor(parts: Any, config: Any) -> None:
    found = processing_from(processor(parts), config)
    assert (found.tokenizer, found.image_processor) == (parts.tokenizer, parts.image_processor)
    assert found.family == QWEN2_VL
    assert processing_from(parts, config) == parts


def test_a_tokenizer_alone(parts: Any, config: Any) -> None:
    found = processing_from(parts.tokenizer, config)
    assert found.tokenizer is parts.tokenizer
    assert found.image_processor is None


def test_the_processors_chat_template_counts(parts: Any, config: Any) -> None:
    before = parts.tokenizer.chat_template
    found = processing_from(processor(parts, chat_template=OURS), config)
    assert found.tokenizer.chat_template == OURS
    assert found.tokenizer("left")["input_ids"] == parts.tokenizer("left")["input_ids"]
    assert parts.tokenizer.chat_template == before, "what the user passed is left as it was"


def test_the_processors_chat_template_in_a_folder(parts: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    load_policy(str(tiny_model_dir)).save_pretrained(tmp_path)
    parts.save_pretrained(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": OURS}))
    assert load_processing(str(tmp_path)).tokenizer.chat_template == OURS


def test_a_text_model_takes_no_image_processor(parts: Any) -> None:
    found = processing_from(processor(parts), Qwen2Config())
    assert found.image_processor is None
    assert found.family == QWEN2


def test_what_is_not_the_models(parts: Any, config: Any) -> None:
    with pytest.raises(ValueError, match="processing_class=int has no tokenizer"):
        processing_from(3, config)
    with pytest.raises(ValueError, match="has a object, which cuts no patch grids: Qwen2-VL needs"):
        processing_from(processor(parts, image_processor=object()), config)
    other = AutoConfig.for_model("qwen2_vl", image_token_id=7)
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is [0-9]+, but the model takes 7 for a picture"):
        processing_from(parts, other)


def test_of_an_unknown_family_the_text_side_can_be_used(parts: Any, tmp_path: Path) -> None:
    text = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.VipLlavaForConditionalGeneration(VipLlavaConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    parts.tokenizer.save_pretrained(tmp_path)
    for found in (load_processing(str(tmp_path)), processing_from(parts.tokenizer, model.config)):
        assert (found.family.name, found.image_processor) == ("vipllava", None)
