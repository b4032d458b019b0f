"""Tiny random models of many families, made offline from transformers' config classes, and prompts for them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from fastgrpo.types import Prompt

VOCABULARY = 97
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

TEXT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", HEADS | EXPERTS),
    "Llama": ("Llama", {}),
    "Mistral without window": ("Mistral", {"sliding_window": None}),
    "Phi-3": ("Phi3", {}),
    "Gemma": ("Gemma", HEADS),
    "Granite": ("Granite", {"logits_scaling": 4.0}),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM3": ("SmolLM3", {}),
    "GLM-4": ("Glm4", HEADS | {"partial_rotary_factor": 0.5}),
}
"""Name → transformers' prefix of the classes, and what its config has beside `TEXT`."""


def text_model(name: str) -> Any:
    """A causal language model of that name, float32, without end token."""
    prefix, changes = TEXT_FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**(TEXT | changes))
    return sharpened(lambda: getattr(transformers, f"{prefix}ForCausalLM")(config))


def sharpened(make: Callable[[], Any]) -> Any:
    """A model with larger weights: a fresh one's distributions are nearly uniform and forget the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3 if "embed" in name else 5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
                else:  # norms, some of which multiply by 1 + weight
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def text_prompts(*lengths: int) -> list[Prompt]:
    """Prompts of random tokens."""
    draw = torch.Generator().manual_seed(0)
    return [
        Prompt(i, torch.randint(3, VOCABULARY, (n,), generator=draw), torch.arange(n).expand(3, -1), None, None, "")
        for i, n in enumerate(lengths)
    ]
