"""Attention over the paged cache, plugged into transformers' models for sampling."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastgrpo_kernels import PagedLayout, apply_rotary, decode_attention
from torch import Tensor
from transformers import AttentionInterface

from fastgrpo.model.attention import varlen_attention
from fastgrpo.model.fused_text import fused_text
from fastgrpo.model.linear_attention import State, finish, linear_layers, project, run_sequences, run_token
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


def _attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[T, H, D] of queries like it and of keys and values [T, Hkv, D], which are written; cos and sin [T, D] rotate
    both, unless None."""
    place = paged.places[layer.layer_idx]
    keys, values = paged.cache.keys[place], paged.cache.values[place]
    q, k, v = (tensor.to(keys.dtype) for tensor in (query, key, value))
    if paged.layout is not None:
        window = None if sliding_window is None or sliding_window >= paged.longest else sliding_window
        kind: dict[str, Any] = {"scale": scaling, "window": window, "softcap": softcap}
        return decode_attention(q, k, v, cos, sin, keys, values, paged.slots, paged.layout, **kind)
    assert paged.prompts is not None
    if cos is not None and sin is not None:
        q, k = apply_rotary(q, k, cos, sin)
    for cache, new in ((keys, k), (values, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, paged.slots, new)
    segments = replace(paged.prompts, softcap=softcap)
    if sliding_window is not None and sliding_window < segments.max_q:
        segments = replace(segments, window=sliding_window)
    return varlen_attention(q, k, v, segments, causal=True, scale=scaling)


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
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    kind: dict[str, Any] = {"scaling": scale, "sliding_window": sliding_window, "softcap": softcap}
    return _attend(module, q, k, v, None, None, paged=paged, **kind)[None].to(query.dtype), None


def _attend_rotated(
    module: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, paged: PagedStep, **_: Any
) -> Tensor:
    """`fused_text`'s attention."""
    return _attend(module, q, k, v, cos, sin, paged=paged, scaling=module.scaling).to(q.dtype)


# Registered without a mask function: transformers then builds no mask.
AttentionInterface.register(NAME, _attention)


def _linear_attention(module: Any, place: int, hidden_states: Tensor, *, paged: PagedStep, **_: Any) -> Tensor:
    """[1, T, H] → [1, T, H] through the `place`-th layer of linear attention: prompts, or a token of each row."""
    tokens = project(module, hidden_states[0])
    if paged.prompts is not None:
        out, states = run_sequences(module, tokens, paged.prompts.q_lengths)
        paged.prompt_states.append(states)
    else:
        rows = [state.narrow(0, 0, len(tokens.mixed)) for state in paged.cache.states[2 * place : 2 * place + 2]]
        out = run_token(module, tokens, State(*rows), paged.slots >= 0)
    return finish(module, out, tokens.gate)[None]


@contextmanager
def paged_layers(model: Any) -> Iterator[None]:
    """Within this context, the language model's layers read and write the paged cache."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        with fused_text(model, attend=_attend_rotated), ExitStack() as stack:
            for place, (_, module) in enumerate(sorted(linear_layers(model).items())):
                stack.enter_context(replaced_forward(module, partial(_linear_attention, module, place)))
            yield
    finally:
        config._attn_implementation = before
