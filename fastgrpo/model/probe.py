"""What a model's attention layers ask for, found by running a copy of it without weights on one token."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastgrpo.model.families import base_model, mrope_sections

NAME = "fastgrpo_probe"
"""The name under which the attention is registered."""

CHANGES = {
    "s_aux": "attention sinks",
    "position_bias": "a bias by position",
    "indexer_topk": "chosen keys",
}
"""Arguments of transformers' attention functions that change the attention → what they are called."""


@dataclass(frozen=True)
class AttentionLayer:
    """One call of attention in a model's forward pass."""

    index: int
    """Of the layer, from 0."""
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """Keys that a query sees, itself included; None: all before it."""
    changes: tuple[str, ...]
    """Names in `CHANGES` that it asks for."""


@dataclass
class _Record:
    """Passed through the model as the keyword `probe`."""

    layers: list[AttentionLayer] = field(default_factory=list)


class HostReadError(ValueError):
    """A forward pass that cannot run without values."""


def attention_layers(model: Any) -> tuple[AttentionLayer, ...]:
    """The attention layers of a transformers model, in order; layers of linear attention are not among them.

    Raises:
        ValueError: a model that takes its attention elsewhere.
        HostReadError: one whose forward pass reads values on the host.
    """
    policy = base_model(model)
    name = type(policy).__name__
    record = _Record()
    zero = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            _bare(policy)(
                input_ids=zero,
                attention_mask=None,
                position_ids=zero.expand(3, 1, 1) if mrope_sections(model) else zero,
                use_cache=False,
                probe=record,
            )
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise HostReadError(f"{name} does not run without values: {reason}") from error
    if not record.layers:
        raise ValueError(f"{name} does not take its attention, with keywords, from transformers' AttentionInterface")
    return tuple(record.layers)


def _bare(policy: Any) -> Any:
    """A copy without weights, in what transformers' grouped products of experts take."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        bare = type(policy)(copy.deepcopy(policy.config)).eval().bfloat16()
    bare.config.get_text_config()._attn_implementation = NAME
    return bare


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    probe: _Record | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: notes what is asked for and returns something of the right shape."""
    if probe is not None:
        changes = tuple(name for name in CHANGES if arguments.get(name) is not None)
        index = getattr(module, "layer_idx", len(probe.layers))
        probe.layers.append(
            AttentionLayer(index, key.shape[1], key.shape[-1], value.shape[-1], sliding_window, changes)
        )
    return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


# Registered without a mask function: transformers then builds no mask.
AttentionInterface.register(NAME, _attention)
