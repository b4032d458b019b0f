"""Every kind of adapter: what completions are drawn from is what is trained."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from run_files import parameters
from transformers import AutoModelForCausalLM

from fastgrpo.types import PromptBatch, TrainingGroup

LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "LoRA": LoraConfig(r=2, target_modules=LINEAR),
    "rsLoRA": LoraConfig(r=2, target_modules=LINEAR, use_rslora=True),
    "DoRA": LoraConfig(r=2, target_modules=LINEAR, use_dora=True),
    "LoRA on every layer": LoraConfig(r=2, target_modules="all-linear"),
    "LoRA with whole modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"]),
    "LoRA with biases": LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    "LoRA on the embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "LoRA on the head": LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=LINEAR, total_step=10, init_r=2, target_r=2),
    "LoHa": peft.LoHaConfig(r=2, target_modules=LINEAR),
    "LoKr": peft.LoKrConfig(r=2, target_modules=LINEAR),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0),
    "BOFT": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(r=2, target_modules=["q_proj"]),
    "MiSS": peft.MissConfig(r=2, target_modules=["q_proj"]),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[*range(200, 532)], target_modules=["embed_tokens"]),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}
ON_PICTURES = ("LoRA", "DoRA", "IA3", "LoRA with whole modules", "LoHa")
CLOSE = 2e-5
"""Largest difference between a token's log-probs when it was drawn and when it is trained on, in float32."""


def train(trainer: Any) -> dict[str, Any]:
    """Two steps, the first of which moves the adapters off their first values; the second's log line."""
    trainer.train()
    line: dict[str, Any] = trainer.state.log_history[1]
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_that_draws_is_the_policy_that_trains(build: Any, kind: str) -> None:
    trainer = build(peft_config=copy.deepcopy(KINDS[kind]), max_steps=2, max_completion_length=6)
    before = parameters(trainer)
    line = train(trainer)
    assert line["sampling/sampling_logp_difference/max"] < CLOSE
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=CLOSE)
    after = parameters(trainer)
    trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved, "adapters train"
    assert moved <= trained, "the base does not"


@pytest.mark.parametrize("kind", ON_PICTURES)
def test_it_is_with_pictures_too(build: Any, tiny_model_dir: Path, kind: str) -> None:
    pictures = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    rows = [{"prompt": [{"role": "user", "content": "Which?"}], "image": picture} for picture in pictures]
    trainer = build(model=str(tiny_model_dir), train_dataset=rows, peft_config=copy.deepcopy(KINDS[kind]))
    trainer.train()  # moves the adapters off their first values
    trainer.engine.sync()
    trainer.model.eval()
    prompts = trainer.data_collator([trainer.rows[0], trainer.rows[1]]).prompts
    drawn = trainer.generate(PromptBatch(prompts))
    none = torch.zeros(2)
    groups = [TrainingGroup(*rollout, none, *[tuple(c.logprobs for c in rollout.completions)] * 2) for rollout in drawn]
    for rollout, again in zip(drawn, trainer.updater.logprobs(groups), strict=True):
        for completion, logprobs in zip(rollout.completions, again, strict=True):
            # Not those of the draw: placeholders of pictures are never drawn.
            torch.testing.assert_close(logprobs, completion.logprobs, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("kind", ["prefix tuning", "prompt tuning", "P-tuning"])
def test_prompts_of_different_lengths_with_a_learnt_prompt(build: Any, kind: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "Explicit is better than implicit, and simple is better than complex"}]
    trainer = build(train_dataset=rows, peft_config=copy.deepcopy(KINDS[kind]), max_steps=2)
    assert train(trainer)["sampling/sampling_logp_difference/max"] < CLOSE


@pytest.mark.parametrize("kind", ["prefix tuning", "prompt tuning"])
def test_a_learnt_prompt_of_a_vision_model_is_refused(build: Any, tiny_model_dir: Path, kind: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(ValueError, match=r"peft_config: .*LoRA"):
        build(model=str(tiny_model_dir), train_dataset=rows, peft_config=copy.deepcopy(KINDS[kind]))


def test_a_learnt_prefix_turns_checkpointing_off(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(peft_config=copy.deepcopy(KINDS["prefix tuning"]), gradient_checkpointing=True, max_steps=2)
    assert "gradient_checkpointing is off" in caplog.text
    assert train(trainer)["sampling/sampling_logp_difference/max"] < CLOSE


@pytest.mark.parametrize("kind", ["LoRA", "prompt tuning", "IA3"])
def test_the_kl_term_starts_at_zero(build: Any, kind: str) -> None:
    trainer = build(peft_config=copy.deepcopy(KINDS[kind]), beta=0.1, max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 0


def test_adapters_with_checkpointing(build: Any) -> None:
    trainer = build(peft_config=copy.deepcopy(KINDS["LoRA"]), gradient_checkpointing=True, max_steps=2)
    before = parameters(trainer)
    train(trainer)
    after = parameters(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_" in name)


def test_a_model_with_adapters_trains_them_further(build: Any, text_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(text_model)
    trainer = build(model=get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR)), beta=0.1, max_steps=2)
    before = parameters(trainer)
    train(trainer)
    after = parameters(trainer)
    assert isinstance(trainer.model, PeftModel)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("lora_" not in name), name


def test_adapters_on_adapters_are_refused(build: Any, text_model: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(text_model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="peft_config"):
        build(model=model, peft_config=LoraConfig(target_modules=["q_proj"]))


def test_saved_adapters_come_back(build: Any, text_model: Path, tmp_path: Path) -> None:
    trainer = build(peft_config=copy.deepcopy(KINDS["LoRA"]))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(text_model), tmp_path / "saved")
    mine = {name: value for name, value in parameters(trainer).items() if "lora_" in name}
    theirs = dict(loaded.named_parameters())
    assert mine
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
