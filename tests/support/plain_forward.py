"""A forward pass as a plain user of transformers writes it: the truth that rollouts and updates are compared with."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.types import Prompt


def hf_inputs(model: Any, prompt: Prompt, token_ids: Tensor | None = None) -> dict[str, Tensor]:
    """What a plain user of transformers passes for a prompt (and a completion): one row, no padding, no positions."""
    ids = prompt.input_ids if token_ids is None else torch.cat([prompt.input_ids, token_ids])
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if prompt.pixel_values is not None:
        inputs["pixel_values"], inputs["image_grid_thw"] = prompt.pixel_values, prompt.image_grid_thw
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()[None]
    return inputs


def hf_logits(model: Any, prompt: Prompt, token_ids: Tensor) -> Tensor:
    """[C, V] float64: the logits that predict each completion token, from a forward pass of its own."""
    logits = model(**hf_inputs(model, prompt, token_ids), use_cache=False).logits[0]
    return logits[len(prompt.input_ids) - 1 : -1].double()
