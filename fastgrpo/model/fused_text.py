"""Replaces decoder layers of language models by fused kernels and another attention, within a context."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from fastgrpo.model.families import text_model
from fastgrpo.model.fused_modules import (
    class_of,
    fused_modules,
    is_known,
    is_norm,
    log_fused,
    stream_dtype,
)
from fastgrpo.model.replaced_forward import replaced_class, replaced_forward

LAYERS = (
    "Qwen2DecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
    "Qwen3VLTextDecoderLayer",
    "Qwen3VLMoeTextDecoderLayer",
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "GemmaDecoderLayer",
)
"""x + self_attn(input_layernorm(x)), then x + mlp(post_attention_layernorm(x))."""

ATTENTIONS = (
    "Qwen2Attention",
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "Qwen3VLTextAttention",
    "Qwen3VLMoeTextAttention",
    "LlamaAttention",
    "MistralAttention",
    "GemmaAttention",
)
"""o_proj(attention(q_proj, k_proj, v_proj)) with q_norm and k_norm where there are any, rotary embeddings, and nothing
else."""

Attend = Callable[..., Tensor]
"""(module, q [T, H, D], k, v [T, Hkv, D], cos, sin [T, D], **what the model was called with) → [T, H, D]; q and k are
not rotated yet."""


@contextmanager
def fused_text(*models: Any, attend: Attend) -> Iterator[None]:
    """Within this context, layers of known classes in these language models (wrapped or not) run fused kernels, and
    `attend`.

    Enclose forward *and* backward passes: gradient checkpointing runs the forward again.
    """
    texts = list(dict.fromkeys(text_model(model) for model in models))  # two models may be one
    layers = [layer for text in texts for layer in getattr(text, "layers", ()) if class_of(layer) in LAYERS]
    attentions = [layer.self_attn for layer in layers if _is_plain(layer.self_attn)]
    whole = [
        layer
        for layer in layers
        if is_known(layer, LAYERS) and is_norm(layer.input_layernorm) and is_norm(layer.post_attention_layernorm)
    ]
    with fused_modules(*texts), ExitStack() as stack:
        for attention in attentions:
            stack.enter_context(replaced_forward(attention, partial(_attention, attention, attend)))
        for layer in whole:
            stack.enter_context(replaced_class(layer, _fused(layer.__class__)))
        log_fused(attentions + whole)
        yield


def _is_plain(attention: Any) -> bool:
    """Whether `_attention` computes what this module does: not if it has a sliding window."""
    window = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
    return is_known(attention, ATTENTIONS) and window is None


def _attention(
    module: Any, attend: Attend, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **arguments: Any
) -> tuple[Tensor, None]:
    """[1, T, H] → [1, T, H]; `attend` knows what is seen, and `position_embeddings` positions."""
    heads = (hidden_states.shape[1], -1, module.head_dim)
    q, k, v = (project(hidden_states).view(heads) for project in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    cos, sin = position_embeddings  # [1, T, D]
    out = attend(module, q, k, v, cos[0], sin[0], **arguments)
    return module.o_proj(out.flatten(1)[None]), None


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
