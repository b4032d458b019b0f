"""Adapters on weights of 4 bits (QLoRA): the sampler reads them as the numbers that they stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from run_files import parameters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastgrpo.sampler.engine import SamplerEngine

pytest.importorskip("bitsandbytes")


@pytest.fixture
def quantized(text_model: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        text_model, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


def test_the_sampler_draws_from_what_trains(build: Any, quantized: Any) -> None:
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    trainer = build(model=quantized, peft_config=adapters, max_steps=2, max_completion_length=6, beta=0.1)
    assert isinstance(trainer.engine, SamplerEngine)
    before = parameters(trainer)
    trainer.train()
    line = trainer.state.log_history[1]
    assert line["sampling/sampling_logp_difference/max"] < 1e-3
    assert line["kl"] > 0
    after = parameters(trainer)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "lora_" in name
    }


def test_a_quantized_model_without_adapters_has_nothing_sensible_to_train(build: Any, quantized: Any) -> None:
    with pytest.raises(ValueError, match="quantized"):
        build(model=quantized).train()
