"""Layers of linear attention (the gated delta rule: Qwen3-Next, Qwen3.5) that start where their prompt ended.

Their modules read and write their state through a cache object. The one here hands over a state as it is, with its
gradient: what the short convolution saw last, and the recurrent state.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgrpo.model.families import base_model

CLASSES = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")


class State(NamedTuple):
    """Of n sequences, after some tokens."""

    convolution: Tensor
    """[n, channels, kernel − 1], the last inputs of the convolution."""
    recurrent: Tensor
    """[n, value heads, key size, value size]."""


class StateCache:
    """Stands in for transformers' cache in one call of one layer."""

    def __init__(self, state: State | None = None) -> None:
        self.convolution = None if state is None else state.convolution
        self.recurrent = None if state is None else state.recurrent

    @property
    def state(self) -> State:
        """After the call."""
        assert self.convolution is not None
        assert self.recurrent is not None
        return State(self.convolution, self.recurrent)

    def get_conv_state(self, *_: Any, **__: Any) -> Tensor | None:
        return self.convolution

    def get_recurrent_state(self, *_: Any, **__: Any) -> Tensor | None:
        return self.recurrent

    def is_recording_past(self, *_: Any) -> bool:
        """True: so that one token takes the path that writes nothing in place."""
        return True

    def update_conv_state(self, inputs: Tensor, layer: int, conv_kernel_size: int, **_: Any) -> Tensor:
        """[n, channels, T] in; with what came before in front, out."""
        kept = conv_kernel_size - 1
        before = self.convolution
        if before is None:
            before = inputs.new_zeros(*inputs.shape[:2], kept)
        whole = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
        self.convolution = whole[..., whole.shape[-1] - kept :]
        return whole

    def update_recurrent_state(self, state: Tensor, *_: Any, **__: Any) -> Tensor:
        self.recurrent = state
        return state

    # Before transformers 5.23, modules look into the cache's layers.

    record_past = True

    @property
    def layers(self) -> "StateCache":
        return self

    def __getitem__(self, layer: int) -> "StateCache":
        return self

    @property
    def recurrent_states(self) -> list[Tensor | None]:
        return [self.recurrent]

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return self.recurrent is not None


def linear_layers(model: Any) -> dict[int, Any]:
    """The linear attention modules of a model, by the index of their layer."""
    return {module.layer_idx: module for module in base_model(model).modules() if type(module).__name__ in CLASSES}


def run_prompts(forward: Callable[..., Tensor], hidden: Tensor, lengths: Sequence[int]) -> tuple[Tensor, State]:
    """Outputs [1, T, H] of n prompts that lie one after another in hidden [1, T, H], and the states after them.

    As one left-padded batch, which is exact: zeros leave the convolution and a state of zeros as they are. One call:
    under ZeRO-3 every rank must call a module equally often.
    """
    cache = StateCache()
    rows = pad_sequence(hidden[0].split(list(lengths)), batch_first=True, padding_side="left")
    found = forward(rows, cache_params=cache)
    return torch.cat([row[len(row) - n :] for row, n in zip(found, lengths, strict=True)])[None], cache.state
