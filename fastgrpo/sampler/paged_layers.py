"""Attention over the paged cache, plugged into transformers' models for sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastgrpo_kernels import PagedLayout, decode_attention
from torch import Tensor
from transformers import AttentionInterface

from fastgrpo.model.attention import varlen_attention
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
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    keys, values = paged.cache.keys[module.layer_idx], paged.cache.values[module.layer_idx]
    q, k, v = (tensor[0].transpose(0, 1).to(keys.dtype) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if paged.layout is not None:
        window = None if sliding_window is None or sliding_window >= paged.longest else sliding_window
        out = decode_attention(q, k, v, None, None, keys, values, paged.slots, paged.layout, scale=scale, window=window)
    else:
        assert paged.prompts is not None
        for cache, new in ((keys, k), (values, v)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, paged.slots, new)
        segments = paged.prompts
        if sliding_window is not None and sliding_window < segments.max_q:
            segments = replace(segments, window=sliding_window)
        out = varlen_attention(q, k, v, segments, causal=True, scale=scale)
    return out[None].to(query.dtype), None


# Registered without a mask function: transformers then builds no mask.
AttentionInterface.register(NAME, _attention)


@contextmanager
def paged_layers(model: Any) -> Iterator[None]:
    """Within this context, the language model's layers read and write the paged cache."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
