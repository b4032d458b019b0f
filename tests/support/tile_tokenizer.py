"""A byte-level tokenizer with the tokens of a family that cuts pictures into tiles, and a tiny model for it."""

from typing import Any

import transformers
from tiny_families import VISION_FAMILIES, sharpened, tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastgrpo.model.families import Family

PARTS = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ TOKEN if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
)
"""Leaves a content that is a string out, as LLaVA's and SmolVLM's do."""
TILES_MARKED = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]


def tile_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Its chat template is `PARTS`."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|end|>", *family.picture_tokens, *TILES_MARKED]
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    named = dict(zip(("image_token", "boi_token", "eoi_token"), family.picture_tokens, strict=False))  # for Gemma 3's
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=PARTS.replace("TOKEN", repr(family.template_token or family.image_token)),
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=named,
    )


def model_for(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tiny model of a family of `bench/tiny_families.py`, without end token."""
    config = tiny_config(name)
    config.get_text_config().vocab_size = len(tokenizer)
    config.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    kind = getattr(transformers, f"{VISION_FAMILIES[name][0]}ForConditionalGeneration")
    return sharpened(lambda: kind(config))
