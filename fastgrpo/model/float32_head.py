"""The LM head's product in float32, whatever the layers before it compute in (ScaleRL, arXiv 2510.13786)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.model.replaced_forward import replaced_forward


def require_plain_head(model: Any) -> None:
    """Raises a ValueError if the head is more than a linear layer, which adapters make of it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"cast_lm_head_to_fp32=True: the LM head is a {type(head).__name__}, not a linear layer. Leave it off, or "
            "take lm_head out of the adapters' target_modules."
        )


def float32_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., V] float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


@contextmanager
def head_in_float32(model: Any) -> Iterator[None]:
    """Within this context the model's head computes in float32."""
    head = model.get_output_embeddings()
    with replaced_forward(head, lambda hidden: float32_logits(head, hidden)):
        yield
