"""Newer Qwen models, tiny, for the tests' tokenizer and pictures."""

from typing import Any

import torch
import transformers


def tiny_qwen(name: str, tokenizer: Any) -> Any:
    """A tiny Qwen3-VL or Qwen3.5 of random weights."""
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 14} | ({"deepstack_visual_indexes": [0]} if name == "Qwen3VL" else {})
    if name == "Qwen3_5":
        text["rope_parameters"]["mrope_section"] = [1, 1, 0]
        text |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        text |= {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    tokens = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, video_token_id=1, **ids)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)
