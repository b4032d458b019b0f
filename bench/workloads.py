"""Every model, prompt and batch that the runners share. Weights, pictures, words and completions are random."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import compute_dtype
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo.demo.base_model import build_config, load_tokenizer, save_model
from fastgrpo.types import Completion, Prompt, TrainingGroup

IMAGE, VIDEO = 3, 4
FIRST_WORD = 10
"""Token ids from here on are words; those before have a meaning."""


@dataclass(frozen=True)
class ModelSize:
    """A Qwen2-VL's."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_mlp_ratio: int = 4

    @property
    def text(self) -> dict[str, Any]:
        """The text config's fields. A quarter of the rotary frequencies is for time, the rest for height and width."""
        width = self.hidden // self.heads
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [width // 8, 3 * width // 16, 3 * width // 16],
            },
        }

    @property
    def vision(self) -> dict[str, Any]:
        """The vision config's fields."""
        return {
            "depth": self.vision_layers,
            "embed_dim": self.vision_hidden,
            "num_heads": self.vision_heads,
            "mlp_ratio": self.vision_mlp_ratio,
        }

    @property
    def config(self) -> Qwen2VLConfig:
        """For a model without a tokenizer."""
        return Qwen2VLConfig(
            text_config={**self.text, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            vision_config={**self.vision, "hidden_size": self.hidden, "patch_size": 14},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=True,
        )


MODELS = {
    "smoke": ModelSize(1000, 64, 128, 2, 2, 1, 1, 32, 2, 2),
    "1M": ModelSize(1000, 128, 256, 3, 4, 2, 2, 64, 4, 3),
    "3M": ModelSize(768, 256, 512, 4, 4, 2, 3, 128, 4, 3),
    "4M": ModelSize(4096, 192, 512, 4, 6, 2, 4, 128, 4),
    "50M": ModelSize(32_000, 512, 1536, 8, 8, 2, 6, 320, 8),
    "2B": ModelSize(151_936, 1536, 8960, 28, 12, 2, 32, 1280, 16),
}


@dataclass(frozen=True)
class Workload:
    """Prompts of a picture and some words each, and how many tokens their completions have."""

    model: str = "4M"
    prompts: int = 1
    lengths: tuple[int, ...] = (64,) * 8
    """Of a prompt's completions."""
    text_tokens: tuple[int, ...] = (70,)
    """Of the prompts in turn."""
    patches: int = 24
    """Along each side of a picture, 14 pixels each; a quarter of all become tokens."""
    pictures: int = 1
    rounds: int = 5

    @property
    def group(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """Completions in all."""
        return self.prompts * self.group

    @property
    def new_tokens(self) -> int:
        return max(self.lengths)

    @property
    def prompt_tokens(self) -> int:
        """Of the first prompt."""
        return self.text_tokens[0] + self.pictures * (self.patches // 2) ** 2

    def of(self, tokens: int, group: int | None = None) -> "Workload":
        """With completions of this length."""
        return replace(self, lengths=(tokens,) * (group or self.group))


SMALL = Workload()
"""A 336-px picture and 214 tokens."""
PAPER = Workload("2B", text_tokens=(444,), patches=32, lengths=(324,) * 8, rounds=3)
"""Prompts of 700 tokens, in the paper's groups."""
RAGGED, PAPER_RAGGED = (1, 5, 9, 17, 26, 38, 51, 64), (60, 120, 190, 260, 340, 430, 560, 700)


def rollouts_of(device: str, rows: tuple[int, ...] = (8, 64, 256, 512)) -> dict[str, Workload]:
    """What is drawn; `rows` completions on a GPU."""
    if device == "cuda":
        return {f"B={count}": replace(PAPER, prompts=count // PAPER.group) for count in rows}
    four = replace(SMALL, prompts=4, text_tokens=(70, 64, 76, 70))
    return {
        "64 tokens": four,
        "256 tokens": replace(four.of(256), rounds=3),
        "50M model, 448 px": replace(four, model="50M", patches=32, rounds=1),
    }


def updates_of(device: str) -> dict[str, Workload]:
    """What is trained on."""
    if device == "cuda":
        paper = replace(PAPER, prompts=8)
        return {"full": paper.of(700), "ragged": replace(paper, lengths=PAPER_RAGGED)}
    return {
        "full": SMALL,
        "ragged": replace(SMALL, lengths=RAGGED),
        "C=16": SMALL.of(16),
        "C=256": SMALL.of(256),
        "P=162": replace(SMALL, text_tokens=(18,)),
        "P=400": replace(SMALL, text_tokens=(256,)),
        "G=2": SMALL.of(64, group=2),
        "G=4": SMALL.of(64, group=4),
        "G=16": SMALL.of(64, group=16),
        "4 prompts": replace(SMALL, prompts=4),
    }


def build_model(size: ModelSize | str, device: str, dtype: torch.dtype | None = None) -> Any:
    """In evaluation mode, without an end token; by default in bf16 on a GPU, else fp32."""
    size = MODELS[size] if isinstance(size, str) else size
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(size.config)
    model.generation_config.eos_token_id = None
    return model.to(dtype or compute_dtype(device)).eval()


@cache
def build_prompts(workload: Workload, vocabulary: int | None = None) -> list[Prompt]:
    """Kept, so that no timing contains them. `vocabulary`: by default the model's."""
    words = vocabulary or MODELS[workload.model].vocabulary
    return [build_prompt(row, workload, words) for row in range(workload.prompts)]


def build_prompt(row: int, workload: Workload, vocabulary: int) -> Prompt:
    """Random pictures, if any, then random words."""
    draw = torch.Generator().manual_seed(row)
    side, pictures = workload.patches // 2, workload.pictures
    count = workload.text_tokens[row % len(workload.text_tokens)]
    words = torch.randint(FIRST_WORD, vocabulary, (count,), generator=draw)
    place = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).T  # [3, side²]
    text = torch.arange(count).expand(3, -1) + pictures * side
    return Prompt(
        row,
        torch.cat([torch.full((pictures * side**2,), IMAGE), words]),
        torch.cat([*(place + i * side for i in range(pictures)), text], dim=1),
        torch.randn(pictures * workload.patches**2, 3 * 2 * 14 * 14, generator=draw) if pictures else None,
        torch.tensor([[1, workload.patches, workload.patches]] * pictures) if pictures else None,
        "",
    )


def build_groups(workload: Workload, vocabulary: int | None = None) -> list[TrainingGroup]:
    """Random completions and advantages; every token counts alike."""
    words = vocabulary or MODELS[workload.model].vocabulary
    count = workload.prompts * sum(workload.lengths)
    return [
        training_group(prompt, scripted_completions(prompt.row_id, workload, words), count)
        for prompt in build_prompts(workload, words)
    ]


def scripted_completions(row: int, workload: Workload, vocabulary: int) -> list[Completion]:
    """They depend on the row alone."""
    draw = torch.Generator().manual_seed(1000 + row)
    ids = [torch.randint(FIRST_WORD, vocabulary, (n,), generator=draw) for n in workload.lengths]
    guess = [torch.full((n,), -8.0) for n in workload.lengths]
    return [Completion(row, i, ids[i], "", "stop", guess[i], guess[i]) for i in range(workload.group)]


def training_group(prompt: Prompt, completions: list[Completion], count: int) -> TrainingGroup:
    """Advantages that no reward decides; each of the step's `count` tokens weighs the same."""
    lengths = [len(completion.token_ids) for completion in completions]
    return TrainingGroup(
        prompt,
        tuple(completions),
        torch.randn(len(lengths), generator=torch.Generator().manual_seed(prompt.row_id)),
        tuple(torch.full((n,), 1 / count) for n in lengths),
        tuple(torch.ones(n, dtype=torch.bool) for n in lengths),
    )


class NoTexts:
    """In place of a tokenizer: there are no words to these tokens, and no end token."""

    eos_token_id = None

    def batch_decode(self, sequences: list[Tensor], **_: Any) -> list[str]:
        return [""] * len(sequences)


def save_endless_model(folder: Path, size: ModelSize, *, device: str = "cpu") -> int:
    """A model with a tokenizer, in hub format, whose end token it cannot draw; returns its number of parameters."""
    tokenizer = _with_vocabulary(load_tokenizer(), size.vocabulary)
    config = build_config(tokenizer, **size.text)
    for name, value in size.vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config).to(compute_dtype(device))
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    tokenizer.pad_token = "<|endoftext|>"
    assert tokenizer.eos_token_id >= size.vocabulary, "the end token must lie outside the vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, tokenizer)
    return sum(parameter.numel() for parameter in model.parameters())


def _with_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with words that no text contains, up to `size` in all: a model may draw any of them."""
    if size <= len(tokenizer):
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    state["model"]["vocab"] |= added | {f"<|{i}|>": i for i in range(len(tokenizer), size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )
