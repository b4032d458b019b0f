"""Positions, placeholders and text rows of every family, ours and others, against transformers' own forward pass."""

from typing import Any

import pytest
import torch
import transformers
from fastgrpo_kernels import LossParams
from torch import Tensor

from fastgrpo.data.prompts import mrope_position_ids
from fastgrpo.model.families import (
    QWEN2,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_VL,
    base_model,
    family_of,
    is_multimodal,
    mrope_sections,
    patch_sizes,
    placeholder_ids,
    text_model,
    unwrap,
)
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import Completion, Prompt, TrainingGroup

IMAGE, VIDEO = 60, 61
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
QWEN = {
    "Qwen2VL": (TEXT | {"rope_parameters": ROPE}, TOWER | {"embed_dim": 32, "mlp_ratio": 1}),
    "Qwen2_5_VL": (TEXT | {"rope_parameters": ROPE}, TOWER | {"fullatt_block_indexes": [0], "window_size": 56}),
    "Qwen3VL": (TEXT | {"rope_parameters": ROPE, "head_dim": 16}, TOWER | {"deepstack_visual_indexes": [0]}),
    "Qwen3_5": (
        TEXT
        | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}, "head_dim": 16}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        TOWER,
    ),
}
OTHER_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "Llava": (TEXT | {"model_type": "llama"}, OTHER_TOWER),
    "Gemma3": (TEXT | {"head_dim": 16}, OTHER_TOWER),
}


def build(name: str) -> Any:
    text, vision = (QWEN | OTHERS)[name]
    tokens = {
        "Llava": {"image_token_index": IMAGE},
        "Gemma3": {"image_token_index": IMAGE, "boi_token_index": 62, "eoi_token_index": 63},
    }.get(name, {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 62})
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_our_positions_are_those_the_model_works_out(name: str) -> None:
    model = build(name)
    ids = torch.tensor([1, 2, 62, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 63, 5, 6])
    merge, width = patch_sizes(model)
    grid = torch.tensor([[1, 2 * merge, 3 * merge]])
    positions = mrope_position_ids(ids, grid, IMAGE, merge)
    inputs = {
        "input_ids": ids[None],
        "pixel_values": torch.randn(6 * merge**2, width),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int()[None],
    }
    own = model(**inputs, use_cache=False).logits
    assert torch.equal(model(**inputs, position_ids=positions[:, None], use_cache=False).logits, own)
    assert not torch.equal(
        model(**inputs, position_ids=torch.arange(len(ids)).expand(3, 1, -1), use_cache=False).logits, own
    ), "positions matter here"


@torch.no_grad()
def own_logprobs(model: Any, ids: Tensor, completion: Tensor) -> Tensor:
    logits = model(input_ids=torch.cat([ids, completion])[None], use_cache=False).logits[0]
    return logits[len(ids) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]


@pytest.mark.parametrize("name", [*QWEN, *OTHERS])
def test_text_rows(name: str) -> None:
    model = build(name)
    ids, tokens = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    prompt = Prompt(0, ids, torch.arange(3).expand(3, -1), None, None, "")
    completion = Completion(0, 0, tokens, "", "stop", torch.zeros(2), torch.zeros(2))
    group = TrainingGroup(prompt, (completion,), torch.ones(1), (torch.ones(2),), (torch.ones(2).bool(),))
    ((found,),) = PlainUpdater(model, LossParams(), micro_batch_size=1).logprobs([group])
    torch.testing.assert_close(found, own_logprobs(model, ids, tokens), atol=1e-5, rtol=1e-5)


def test_sections_come_from_the_rope_parameters_first() -> None:
    assert mrope_sections(build("Qwen3VL")) == (2, 3, 3)
    model = build("Qwen3VL")
    del model.config.text_config.rope_parameters["mrope_section"]
    assert mrope_sections(model) == (24, 20, 20)
    assert mrope_sections(build("Llava")) is mrope_sections(build("Gemma3")) is None


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (transformers.Qwen2Config, QWEN2),
        (transformers.Qwen2VLConfig, QWEN2_VL),
        (transformers.Qwen2_5_VLConfig, QWEN2_5_VL),
        (transformers.Qwen3VLConfig, QWEN3_VL),
        (transformers.Qwen3VLMoeConfig, QWEN3_VL),
        (transformers.Qwen3_5Config, QWEN3_5),
    ],
)
def test_family_of(config: Any, family: Any) -> None:
    assert family_of(config()) == family


def test_an_unknown_family_has_its_types_name_and_no_pictures() -> None:
    family = family_of(transformers.VipLlavaConfig())
    assert (family.name, family.image_token, family.image_place) == ("vipllava", None, "")
    assert not family.has_packed_decoder


def test_image_place() -> None:
    assert QWEN2_VL.image_place == "<|vision_start|><|image_pad|><|vision_end|>"
    assert QWEN2.image_place == ""


def test_placeholders_are_never_sampled() -> None:
    assert placeholder_ids(build("Qwen2VL")) == [IMAGE, VIDEO]
    assert placeholder_ids(build("Llava")) == [IMAGE]
    assert placeholder_ids(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))) == []


def test_wrappers_are_seen_through() -> None:
    class Wrapper:
        def __init__(self, module: Any) -> None:
            self.module = module

    model = build("Qwen2VL")
    wrapped = Wrapper(Wrapper(model))
    assert unwrap(wrapped) is base_model(wrapped) is model
    assert text_model(wrapped) is model.model.language_model
    assert is_multimodal(wrapped)


def test_patch_sizes_of_another_kind_of_tower() -> None:
    assert patch_sizes(build("Qwen2VL")) == (2, 3 * 2 * 14 * 14)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no vision tower like Qwen2-VL's"):
        patch_sizes(build("Llava"))
