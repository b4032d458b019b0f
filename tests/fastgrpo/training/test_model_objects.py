"""Models passed as objects: of any family, with adapters fresh or trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tile_tokenizer import model_for, tile_tokenizer
from tiny_families import PROCESSORS, image_processor, tiny_config
from tiny_qwen import tiny_qwen
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from fastgrpo.config import GRPOConfig
from fastgrpo.model.families import family_of
from fastgrpo.model.load import Processing, load_policy, load_processing
from fastgrpo.training.trainer import GRPOTrainer

ADAPTERS = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TEXT_ROWS = [{"question": f"{i} and {i}?", "solution": str(2 * i)} for i in range(4)]


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs from completion to completion, whatever the model says."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def build(model: Any, folder: Path, out: Path, rows: Any = TEXT_ROWS, **settings: Any) -> GRPOTrainer:
    parts = {name: settings.pop(name) for name in ("peft_config", "processing_class") if name in settings}
    parts.setdefault("processing_class", load_processing(str(folder)))
    config = GRPOConfig(
        **{
            "output_dir": str(out), "use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 2,
            "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "disable_tqdm": True,
            "learning_rate": 0.1, "lr_scheduler_type": "constant", "log_completions": False,
        } | settings
    )  # fmt: skip
    return GRPOTrainer(model, token_sum, config, rows, **parts)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def vipllava(vocabulary: int) -> VipLlavaForConditionalGeneration:
    text = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return VipLlavaForConditionalGeneration(VipLlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


def test_text_rows_on_a_family_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    processing = load_processing(str(tiny_model_dir))
    build(vipllava(len(processing.tokenizer)), tiny_model_dir, tmp_path, max_steps=1).train()
    assert steps_of(tmp_path)[0]["grad_norm"] > 0


def test_pictures_on_a_family_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [row | {"image": Image.new("RGB", (56, 56))} for row in TEXT_ROWS]
    vocabulary = len(load_processing(str(tiny_model_dir)).tokenizer)
    with pytest.raises(
        ValueError, match="row 0 has images, but how vipllava models take pictures is not known to fastgrpo"
    ):
        build(vipllava(vocabulary), tiny_model_dir, tmp_path, rows)


def test_a_model_from_nowhere_needs_a_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing, and this VipLlavaForConditionalGeneration was not"):
        build(vipllava(64), tiny_model_dir, tmp_path, processing_class=None)


def test_adapters_twice(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_policy(str(tiny_model_dir)), LoraConfig(**ADAPTERS))
    with pytest.raises(ValueError, match="peft_config: the model has adapters already"):
        build(model, tiny_model_dir, tmp_path, peft_config=LoraConfig(**ADAPTERS))


def test_adapters_loaded_for_inference(tiny_model_dir: Path, tmp_path: Path) -> None:
    get_peft_model(load_policy(str(tiny_model_dir)), LoraConfig(**ADAPTERS)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_policy(str(tiny_model_dir)), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        build(model, tiny_model_dir, tmp_path)


def trained(folder: Path, **settings: Any) -> PeftModel:
    """Adapters as far from zero as training would bring them."""
    model = get_peft_model(load_policy(str(folder)), LoraConfig(**ADAPTERS | settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and the head"])
def test_the_reference_of_trained_adapters_is_their_copy(
    tiny_model_dir: Path, tmp_path: Path, engine: str, settings: dict[str, Any]
) -> None:
    model = trained(tiny_model_dir, **settings)
    trainer = build(model, tiny_model_dir, tmp_path, beta=0.04, engine=engine)
    reference = trainer.reference_model
    assert reference is not None
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    copied = {name for name, parameter in reference.named_parameters() if parameter.data_ptr() != own[name]}
    assert copied == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in reference.named_parameters()}
    trainer.train()
    first, second = (step["kl"] for step in steps_of(tmp_path))
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-5
    assert all(torch.equal(parameter, before[name]) for name, parameter in reference.named_parameters())


def test_fresh_adapters_need_no_copy(tiny_model_dir: Path, tmp_path: Path) -> None:
    fresh = get_peft_model(load_policy(str(tiny_model_dir)), LoraConfig(**ADAPTERS, modules_to_save=["lm_head"]))
    assert build(fresh, tiny_model_dir, tmp_path, beta=0.04).reference_model is None
    odd = LoraConfig(**ADAPTERS, init_lora_weights=False)
    trainer = build(str(tiny_model_dir), tiny_model_dir, tmp_path / "odd", beta=0.04, peft_config=odd)
    assert trainer.reference_model is not None, "these adapters do not start at zero"


@pytest.mark.parametrize("name", ["Qwen3VL", "Qwen3_5"])
def test_pictures_and_text_on_newer_families(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    rows = [row | {"image": Image.effect_noise((56, 56), 60) if i % 2 else None} for i, row in enumerate(TEXT_ROWS)]
    tokenizer = load_processing(str(tiny_model_dir)).tokenizer
    model = tiny_qwen(name, tokenizer)
    trainer = build(model, tiny_model_dir, tmp_path, rows, max_steps=1, beta=0.04, gradient_accumulation_steps=2)
    before = {key: parameter.clone() for key, parameter in trainer.model.named_parameters()}
    trainer.train()
    (step,) = steps_of(tmp_path)
    # Placeholders are never drawn: the other 400 tokens share their probability.
    assert step["sampling/sampling_logp_difference/max"] < 1e-2
    assert step["kl"] == pytest.approx(0.0, abs=1e-6)
    still = {key for key, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[key])}
    assert not still


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["whole", "lora"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_and_text_on_families_of_tiles(
    tiny_model_dir: Path, tmp_path: Path, name: str, adapters: dict[str, Any] | None
) -> None:
    picture = Image.effect_noise((60, 40), 60)
    rows = [row | {"images": [picture] * (i % 3)} for i, row in enumerate(TEXT_ROWS)]
    family = family_of(tiny_config(name))
    tokenizer = tile_tokenizer(family)
    parts = Processing(tokenizer, image_processor(name), family)
    peft_config = None if adapters is None else LoraConfig(**adapters)
    model = model_for(name, tokenizer)
    settings = {"peft_config": peft_config, "processing_class": parts, "gradient_accumulation_steps": 2, "beta": 0.04}
    trainer = build(model, tiny_model_dir, tmp_path, rows, **settings)
    before = {key: parameter.clone() for key, parameter in trainer.model.named_parameters()}
    trainer.train()
    for step in steps_of(tmp_path):
        assert step["grad_norm"] > 0
        assert step["sampling/sampling_logp_difference/max"] < 0.2, "placeholders are never drawn"
    moved = {key for key, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[key])}
    assert any("vision" in key for key in moved)
    assert any(part in key for key in moved for part in ("language_model", "text_model"))
