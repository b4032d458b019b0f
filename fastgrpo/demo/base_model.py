"""The demo's base model: a Qwen2-VL of 1.16 M parameters with a tokenizer of its own, shipped in `tiny-qwen2-vl-base/`.

The architecture is transformers' `Qwen2VLForConditionalGeneration`, only small. `fastgrpo.demo.pretrain` says what
it was trained on.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo.data.prompts import BASE_PROMPT

BASE_MODEL_PATH = Path(__file__).parent / "tiny-qwen2-vl-base"
"""The shipped weights, tokenizer and image processor settings, in hub format."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PHRASES = (
    *re.findall(r"\s?[^\s.][^.\n]*\.", BASE_PROMPT),
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "Answer in natural language.",
    " Choose between the following options:",
    " Select from the following choices.",
)
"""Texts that become one (ordinary) token each: the tags, and the fixed sentences of the prompts, which would otherwise
be most of the tokens of so short a prompt."""
VOCAB_SIZE = 768

# ChatML, with an image placeholder where a message has an image.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus. Any text can be encoded and decoded back; `PHRASES` are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL_TOKENS) + len(PHRASES)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    phrases = re.compile("|".join(map(re.escape, sorted(PHRASES, key=len, reverse=True))))
    tokenizer.train_from_iterator((part for text in corpus for part in phrases.split(text)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, **text_overrides: Any) -> Qwen2VLConfig:
    """Four text layers of 128, two vision layers of 96; `text_overrides` replace fields of the text config."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **text_overrides,
    }
    vision = {"depth": 2, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 3, "hidden_size": text["hidden_size"]}
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_image_processor_config() -> dict[str, Any]:
    """Contents of preprocessor_config.json: Qwen2-VL's own processor, at most 5 × 5 merged patches."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 140 * 140},
    }


def save_model(path: str | Path, model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes weights, configs, tokenizer and image processor settings in hub format."""
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=eos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    Path(path, "preprocessor_config.json").write_text(json.dumps(build_image_processor_config(), indent=2) + "\n")


def load_tokenizer(path: str | Path = BASE_MODEL_PATH) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(path)


def tiny_model(seed: int = 0, **text_overrides: Any) -> Qwen2VLForConditionalGeneration:
    """Random weights, two text layers of 64, the shipped tokenizer's vocabulary: for tests. Evaluation mode, fp32."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **text_overrides,
    }
    config = build_config(load_tokenizer(), **small)
    config.vision_config.depth = 1
    config.vision_config.embed_dim = 32
    config.vision_config.num_heads = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(config).eval()


def save_tiny_model(path: str | Path, seed: int = 0, **text_overrides: Any) -> Path:
    """Writes `tiny_model` with the shipped tokenizer and image processor settings; returns the folder."""
    save_model(path, tiny_model(seed, **text_overrides), load_tokenizer())
    return Path(path)
