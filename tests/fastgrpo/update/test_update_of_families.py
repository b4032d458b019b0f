"""The packed update of every tiny family against transformers' own forward pass of each sequence alone."""

from pathlib import Path

import pytest
import torch
from family_parity import steps_error, update_errors
from family_ranks import ranks_errors
from fastgrpo_kernels import LossParams
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES, PROCESSORS, family
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from fastgrpo.model.freezing import freeze
from fastgrpo.update.packing import pack
from fastgrpo.update.updater import PackedUpdater

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_and_gradients(name: str) -> None:
    logprobs, gradients = update_errors(*family(name))
    assert logprobs < 1e-4
    # Rounding: Qwen3.5's are 0.9e-5 apart with AVX-512, 1.1e-5 with AVX2.
    assert gradients < (2e-5 if name == "Qwen3.5" else 1e-5)


@pytest.mark.parametrize("name", ["Qwen3-VL", *PROCESSORS])
def test_two_steps_with_and_without_pictures(name: str) -> None:
    """Adapters on every linear layer, then the tower frozen."""
    model, prompts = family(name)
    freeze(model, freeze_vision=True, freeze_llm=False)
    assert steps_error(model, prompts) < 1e-4
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    assert steps_error(get_peft_model(model, adapters).eval(), prompts) < 1e-4


@pytest.mark.parametrize(
    "families",
    [
        ("Qwen3-VL", "Gemma 3 with pictures"),
        pytest.param(("Qwen3.5", "InternVL", "LLaVA-OneVision", "SmolVLM"), marks=pytest.mark.slow),
    ],
)
def test_rollout_and_update_on_ranks(tmp_path: Path, families: tuple[str, ...]) -> None:
    """Under ZeRO 2 and 3, uneven ranks draw the tokens and find the gradients of one process."""
    pytest.importorskip("deepspeed")
    errors = ranks_errors([f"{stage}:{name}" for name in families for stage in (2, 3)], tmp_path)
    assert max(errors.values()) < 1e-4, errors


def test_families_that_cannot_be_packed_are_refused() -> None:
    sinks = GptOssForCausalLM(GptOssConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ValueError, match="attention sinks"):
        PackedUpdater(sinks, LossParams(), token_budget=9)
    dropping = LlamaForCausalLM(LlamaConfig(**TEXT, attention_dropout=0.1))
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1: set it to 0"):
        PackedUpdater(dropping, LossParams(), token_budget=9)
    with pytest.raises(ValueError, match="token_budget=0 is not valid"):
        pack([], 0)
