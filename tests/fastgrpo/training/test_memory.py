"""`gradient_checkpointing=auto`: on where a step would not fit otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fastgrpo_profiling.memory_estimate import step_bytes
from fastgrpo_profiling.roofline import ModelShape
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo import GRPOConfig
from fastgrpo.settings.sft_config import SFTConfig
from fastgrpo.training.memory import is_checkpointed, memory_to_come, step_setting

GB = 1e9


@pytest.fixture(scope="module")
def two_billion() -> Any:
    """Qwen2-VL-2B's shape, without memory for its weights."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "rope_parameters": rope,
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536}
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def papers_run(tmp_path: Path, **changes: Any) -> GRPOConfig:
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": True, "beta": 0.04, "batch_unit": "prompts",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_prompt_length": 1024,
        "max_completion_length": 700, "report_to": [],
    }  # fmt: skip
    return GRPOConfig(**settings | changes)


@pytest.mark.parametrize(
    ("memory", "changes", "checkpointed"),
    [
        (150 * GB, {}, False),
        (85 * GB, {}, True),
        (85 * GB, {"token_budget": 8_192}, False),
        (150 * GB, {"gradient_checkpointing": True}, True),
        (85 * GB, {"gradient_checkpointing": False}, False),
        (150 * GB, {"bf16": False}, True),
        (0, {}, False),
    ],
)
def test_a_step_is_checkpointed_that_would_not_fit(
    two_billion: Any, tmp_path: Path, memory: float, changes: dict[str, Any], checkpointed: bool
) -> None:
    assert is_checkpointed(two_billion, papers_run(tmp_path, **changes), memory) == checkpointed


def test_a_smaller_budget_holds_fewer_groups(two_billion: Any, tmp_path: Path) -> None:
    assert step_setting(two_billion, papers_run(tmp_path)).groups_together == 2
    assert step_setting(two_billion, papers_run(tmp_path, token_budget=8192)).groups_together == 1


@pytest.mark.parametrize(
    ("given", "decides", "is_on"),
    [("auto", True, False), (True, False, True), ("1", False, True), (False, False, False), ("false", False, False)],
)
def test_the_setting_is_a_choice_or_auto(tmp_path: Path, given: Any, decides: bool, is_on: bool) -> None:
    config = papers_run(tmp_path, gradient_checkpointing=given)
    assert (config.decides_checkpointing, config.gradient_checkpointing) == (decides, is_on)


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing='sometimes' is not valid: use true, false or auto"):
        papers_run(tmp_path, gradient_checkpointing="sometimes")


def test_gradients_and_moments_that_are_there_do_not_come_again() -> None:
    layer = torch.nn.Linear(10, 10, bias=False)
    frozen = torch.nn.Linear(10, 10).requires_grad_(False)
    model = torch.nn.Sequential(layer, frozen)
    assert memory_to_come(model, None) == 12 * 100
    optimizer = torch.optim.AdamW(layer.parameters())
    assert memory_to_come(model, optimizer) == 12 * 100
    model(torch.ones(1, 10)).sum().backward()
    assert memory_to_come(model, optimizer) == 8 * 100
    optimizer.step()
    assert memory_to_come(model, optimizer) == 0
    optimizer.zero_grad()
    assert memory_to_come(model, optimizer) == 4 * 100


def test_supervised_training_has_no_sampler(two_billion: Any, tmp_path: Path) -> None:
    setting = step_setting(two_billion, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to=[]))
    parts = step_bytes(ModelShape.known(two_billion.config), setting)
    assert {name: parts[name] for name in ("sampler's weights", "KV cache", "sampler's logits")} == {
        "sampler's weights": 0, "KV cache": 0, "sampler's logits": 0
    }  # fmt: skip
    assert parts["activations"] > 0
