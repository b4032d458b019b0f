"""Replaces decoder layers of language models by fused kernels and shared-prefix attention, within a context."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from fastgrpo_kernels import apply_rotary
from torch import Tensor

from fastgrpo.model.families import text_model
from fastgrpo.model.fused_modules import (
    class_of,
    fused_modules,
    is_known,
    is_norm,
    log_fused,
    stream_dtype,
    without_autocast,
)
from fastgrpo.model.replaced_forward import replaced_class, replaced_forward
from fastgrpo.update.shared_prefix import SharedPrefix, shared_prefix_attention

LAYERS = (
    "Qwen2DecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3DecoderLayer",
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
)
"""x + self_attn(input_layernorm(x)), then x + mlp(post_attention_layernorm(x))."""

ATTENTIONS = ("Qwen2Attention", "Qwen2VLAttention", "Qwen2_5_VLAttention", "LlamaAttention", "MistralAttention")
"""o_proj(attention(q_proj, k_proj, v_proj)) with rotary embeddings and nothing else."""


@contextmanager
def fused_text(*models: Any) -> Iterator[None]:
    """Within this context, layers of known classes in these language models (wrapped or not) run fused kernels.

    Enclose forward *and* backward passes: gradient checkpointing runs the forward again.
    """
    texts = list(dict.fromkeys(text_model(model) for model in models))  # two models may be one
    layers = [layer for text in texts for layer in text.layers if class_of(layer) in LAYERS]
    attentions = [layer.self_attn for layer in layers if _is_plain(layer.self_attn)]
    whole = [
        layer
        for layer in layers
        if is_known(layer, LAYERS) and is_norm(layer.input_layernorm) and is_norm(layer.post_attention_layernorm)
    ]
    with fused_modules(*texts), ExitStack() as stack:
        for attention in attentions:
            stack.enter_context(replaced_forward(attention, partial(_attention, attention)))
        for layer in whole:
            stack.enter_context(replaced_class(layer, _fused(layer.__class__)))
        log_fused(attentions + whole)
        yield


def _is_plain(attention: Any) -> bool:
    """Whether `_attention` computes what this module does: not if it has a sliding window."""
    window = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
    return is_known(attention, ATTENTIONS) and window is None


def _attention(
    attention: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    shared_prefix: SharedPrefix,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, H] → [1, T, H]; the layout replaces masks, and `position_embeddings` positions."""
    heads = (hidden_states.shape[1], -1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (project(hidden_states).view(heads) for project in projections)
    cos, sin = position_embeddings  # [1, T, D]
    q, k = apply_rotary(q, k, cos[0], sin[0])
    with without_autocast(q.device.type):
        layout, backend = shared_prefix.layout, shared_prefix.backend
        out = shared_prefix_attention(q, k, v, layout, scale=attention.scaling, backend=backend)
    return attention.o_proj(out.flatten(1)[None]), None


@functools.cache
def _fused(kind: type) -> type:
    """A subclass of this layer class that adds the residual and normalises in one kernel."""
    return type(f"Fused{kind.__name__}", (kind,), {"forward": _layer})


def _layer(layer: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    x = hidden_states.to(stream_dtype(hidden_states.dtype, hidden_states.device.type))
    normed, x = layer.input_layernorm(x, None)
    attended, _ = layer.self_attn(hidden_states=normed, **arguments)
    normed, x = layer.post_attention_layernorm(attended, x)
    out: Tensor = x + layer.mlp(normed)
    return out
