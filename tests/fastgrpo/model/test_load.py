import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgrpo.model import load
from fastgrpo.model.families import QWEN2, QWEN2_VL
from fastgrpo.model.load import load_policy, load_processing

SPECIAL_TOKENS = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_tokenizer() -> Any:
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", chat_template="{{ messages }}")


TEXT = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def save_vlm(path: Path, tied: bool) -> Path:
    config = Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 1},
        image_token_id=256 + SPECIAL_TOKENS.index("<|image_pad|>"),
        tie_word_embeddings=tied,
    )
    config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    Qwen2VLImageProcessorPil().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_vlm(tmp_path_factory.mktemp("vlm"), tied=True))


@pytest.fixture(scope="module")
def untied_vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_vlm(tmp_path_factory.mktemp("untied"), tied=False))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text")
    Qwen2ForCausalLM(Qwen2Config(**TEXT)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def grid(processor: Any, width: int, height: int) -> list[int]:
    return processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"][0].tolist()


def test_processing_of_a_vision_language_model(vlm: str) -> None:
    processing = load_processing(vlm)
    assert type(processing.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert processing.image_processor.merge_size == 2
    assert grid(processing.image_processor, 140, 84) == [1, 6, 10]
    assert processing.tokenizer("ab<|image_pad|>")["input_ids"][-1] == 256 + 3
    assert processing.tokenizer.chat_template == "{{ messages }}"
    assert processing.family == QWEN2_VL


def test_pixel_bounds_are_areas(vlm: str) -> None:
    small = load_processing(vlm, max_pixels=28 * 28 * 4).image_processor
    _, rows, columns = grid(small, 280, 280)
    assert rows * columns == 4 * 4  # 4 merged patches of 2×2
    large = load_processing(vlm, min_pixels=28 * 28 * 16).image_processor
    _, rows, columns = grid(large, 28, 28)
    assert rows * columns == 4 * 16


def test_pixel_bounds_override_those_of_a_hub_file(vlm: str, tmp_path: Path) -> None:
    shutil.copytree(vlm, tmp_path, dirs_exist_ok=True)
    published = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2}
    published |= {"merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert grid(load_processing(str(tmp_path)).image_processor, 1400, 1400) == [1, 100, 100]
    limited = load_processing(str(tmp_path), max_pixels=401408).image_processor
    _, rows, columns = grid(limited, 1400, 1400)
    assert rows * columns * 14 * 14 <= 401408
    assert rows * columns * 14 * 14 > 0.9 * 401408


def test_processing_of_a_text_model(text_model: str) -> None:
    processing = load_processing(text_model)
    assert processing.image_processor is None
    assert processing.family == QWEN2
    assert len(processing.tokenizer("ab")["input_ids"]) == 2


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({"min_pixels": 0}, "min_pixels=0 must be positive"),
        ({"max_pixels": -5}, "max_pixels=-5 must be positive"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels=5000 exceeds max_pixels=4000"),
        ({"max_pixels": 784}, "min_pixels=3136 exceeds max_pixels=784"),
    ],
)
def test_bad_pixel_bounds(vlm: str, bounds: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_processing(vlm, **bounds)


def test_processing_without_its_files(vlm: str, tmp_path: Path) -> None:
    shutil.copytree(vlm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no usable image processor"):
        load_processing(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        load_processing(str(tmp_path))


@pytest.mark.parametrize("loader", [load_processing, load_policy])
def test_no_such_checkpoint(loader: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_name_or_path='.*' is a folder without a usable config\.json"):
        loader(str(tmp_path))
    with pytest.raises(ValueError, match=r"missing' is neither a folder nor a model reachable on the hub: [^\n]*$"):
        loader(str(tmp_path / "missing"))


def test_policy_by_kind_of_checkpoint(vlm: str, text_model: str) -> None:
    assert type(load_policy(vlm)).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(load_policy(text_model)).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtype_is_float32_unless_asked(vlm: str, tmp_path: Path, dtype: Any, expected: torch.dtype) -> None:
    load_policy(vlm, dtype="bfloat16").save_pretrained(tmp_path)  # as published: the files themselves are bfloat16
    model = load_policy(str(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["int64", "float99", "nn"])
def test_bad_dtype(vlm: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is unknown"):
        load_policy(vlm, dtype=dtype)


def test_model_init_kwargs(vlm: str) -> None:
    kwargs = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = load_policy(vlm, model_init_kwargs=kwargs)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert set(kwargs) == {"dtype", "attn_implementation"}
    assert load_policy(vlm, model_init_kwargs={"torch_dtype": "bfloat16"}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype='float32', but model_init_kwargs has torch\.bfloat16: set it once"):
        load_policy(vlm, dtype="float32", model_init_kwargs=kwargs)
    with pytest.raises(ValueError, match="model_init_kwargs sets use_safetensors"):
        load_policy(vlm, model_init_kwargs={"use_safetensors": False})


def test_only_safetensors(vlm: str, tmp_path: Path) -> None:
    shutil.copytree(vlm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(load_policy(vlm).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no usable safetensors weights"):
        load_policy(str(tmp_path))


def test_attention_backend_is_logged(vlm: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=load.__name__):
        load_policy(vlm, attn_implementation="eager")
    assert [record.getMessage() for record in caplog.records] == ["attention backend: eager"]


@pytest.mark.parametrize(
    ("has_cuda", "reason"), [(False, "there is no CUDA device"), (True, "flash-attn is not installed")]
)
def test_flash_attention_gives_way(
    vlm: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, has_cuda: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: False)
    assert load_policy(vlm, attn_implementation="flash_attention_2").config._attn_implementation == "sdpa"
    assert [record.getMessage() for record in caplog.records] == [
        f"attn_implementation=flash_attention_2 is not available ({reason}): using sdpa"
    ]


def trainable(model: torch.nn.Module) -> set[str]:
    """The parts of the model with any trainable parameter; fails when a part is mixed."""
    flags: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        if "merger" in name:
            part = "merger"
        elif ".visual." in name:
            part = "vision"
        else:
            part = "head" if name.startswith("lm_head") else "language"
        flags.setdefault(part, set()).add(parameter.requires_grad)
    assert all(len(flag) == 1 for flag in flags.values()), flags
    return {part for part, flag in flags.items() if flag == {True}}


@pytest.mark.parametrize("tied", [True, False])
def test_freezing(vlm: str, untied_vlm: str, tied: bool) -> None:
    path, head = (vlm, set()) if tied else (untied_vlm, {"head"})
    assert trainable(load_policy(path)) == {"vision", "merger", "language"} | head
    assert trainable(load_policy(path, freeze_vision=True)) == {"merger", "language"} | head
    assert trainable(load_policy(path, freeze_llm=True)) == {"vision", "merger"}
    both = load_policy(path, freeze_vision=True, freeze_llm=True)
    assert trainable(both) == {"merger"}
    assert both.get_output_embeddings().weight.requires_grad is False
    assert (both.get_output_embeddings().weight is both.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("flag", ["freeze_vision", "freeze_llm"])
def test_freezing_needs_a_vision_tower(text_model: str, flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}=True, but Qwen2ForCausalLM has no vision tower"):
        load_policy(text_model, **{flag: True})  # type: ignore[arg-type]
