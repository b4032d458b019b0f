"""Attention over the paged cache, plugged into transformers' models for sampling."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from fastgrpo_kernels import PagedLayout, decode_attention
from torch import Tensor
from transformers import AttentionInterface

from fastgrpo.model.attention import varlen_attention
from fastgrpo.model.linear_attention import State, StateCache, linear_layers, run_prompts
from fastgrpo.model.replaced_forward import replaced_forward
from fastgrpo.model.segments import Segments
from fastgrpo.sampler.decoder import KVCache

NAME = "fastgrpo_paged"
"""The name under which the attention is registered."""


@dataclass(frozen=True)
class PagedStep:
    """What the attention layers need of a forward pass over T tokens; passed as the keyword `paged`."""

    cache: KVCache
    slots: Tensor
    """[T] int64, where keys and values go; −1: nowhere."""
    layout: PagedLayout | None
    """Of a decode step, one token per row; None in a prefill."""
    prompts: Segments | None
    """Of a prefill, whole prompts; None in a decode step."""
    places: dict[int, int]
    """Of each attention layer, by its index among all: its place in the cache."""
    prompt_states: list[State] = field(default_factory=list)
    """Filled by a prefill: for each layer of linear attention, the states after the prompts."""

    @property
    def longest(self) -> int:
        """Tokens that a row of a decode step has room for; windows of that size see everything."""
        assert self.layout is not None
        pages = self.layout.prefix_tables.shape[1] + self.layout.suffix_tables.shape[1]
        return pages * self.cache.keys[0].shape[1]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    place = paged.places[module.layer_idx]
    keys, values = paged.cache.keys[place], paged.cache.values[place]
    q, k, v = (tensor[0].transpose(0, 1).to(keys.dtype) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if paged.layout is not None:
        window = None if sliding_window is None or sliding_window >= paged.longest else sliding_window
        kind: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
        out = decode_attention(q, k, v, None, None, keys, values, paged.slots, paged.layout, **kind)
    else:
        assert paged.prompts is not None
        for cache, new in ((keys, k), (values, v)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, paged.slots, new)
        segments = replace(paged.prompts, softcap=softcap)
        if sliding_window is not None and sliding_window < segments.max_q:
            segments = replace(segments, window=sliding_window)
        out = varlen_attention(q, k, v, segments, causal=True, scale=scale)
    return out[None].to(query.dtype), None


# Registered without a mask function: transformers then builds no mask.
AttentionInterface.register(NAME, _attention)


def _linear_attention(own: Any, place: int, hidden_states: Tensor, *, paged: PagedStep, **_: Any) -> Tensor:
    """[1, T, H] → [1, T, H] through the `place`-th layer of linear attention: prompts, or a token of each row."""
    if paged.prompts is not None:
        out, states = run_prompts(own, hidden_states, paged.prompts.q_lengths)
        paged.prompt_states.append(states)
        return out
    rows = hidden_states[0].unsqueeze(1)  # [B, 1, H]
    before = [state.narrow(0, 0, len(rows)) for state in paged.cache.states[2 * place : 2 * place + 2]]
    cache = StateCache(State(*before))
    out = own(rows, cache_params=cache)
    is_active = paged.slots >= 0
    for old, new in zip(before, cache.state, strict=True):
        torch.where(is_active.view(-1, *[1] * (old.ndim - 1)), new.to(old.dtype), old, out=old)
    return out.transpose(0, 1)


@contextmanager
def paged_layers(model: Any) -> Iterator[None]:
    """Within this context, the language model's layers read and write the paged cache."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        with ExitStack() as stack:
            for place, (_, module) in enumerate(sorted(linear_layers(model).items())):
                stack.enter_context(replaced_forward(module, partial(_linear_attention, module.forward, place)))
            yield
    finally:
        config._attn_implementation = before
