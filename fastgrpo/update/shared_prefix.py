"""Attention over packed groups that share their prompts, plugged into transformers' models for the update.

A prompt attends to itself; a completion to itself and to its prompt. These two are computed separately and merged by
log-sum-exp, so a prompt's keys and values exist once, however many completions read them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastgrpo_kernels import apply_rotary, merge_attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from fastgrpo.model.attention import Backend, for_segments, pick_attention, varlen_attention
from fastgrpo.model.fused_modules import without_autocast
from fastgrpo.model.linear_attention import linear_layers
from fastgrpo.model.probe import CHANGES, HostReadError, attention_layers
from fastgrpo.update.packing import SharedPrefixLayout

NAME = "fastgrpo_shared_prefix"
"""The name under which the attention is registered."""


@dataclass(frozen=True)
class SharedPrefix:
    """What the attention layers need of a packed batch; passed as the keyword `shared_prefix`."""

    layout: SharedPrefixLayout
    backend: str = "auto"
    """One of `run_config.ATTN_BACKENDS`."""


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ scale) v over the tokens that `layout` lets each attend to; differentiable in q, k and v.

    Args:
        q: [T, H, D].
        k, v: [T, Hkv, D], H a multiple of Hkv.
        scale: None is 1 / √D.
        window: a token sees only so many tokens of its prompt and completion, itself included; None: all before it.
        softcap: scores s become softcap · tanh(s / softcap), in plain torch; None: they stay.

    Returns:
        [T, H, D].

    Raises:
        ValueError: the layout is not one of T tokens, or the backend cannot serve these tensors.
    """
    tokens = layout.prompt_tokens + sum(layout.completions.q_lengths)
    if len(q) != tokens:
        raise ValueError(f"q has {len(q)} tokens, the layout {tokens}: pass the layout of this batch.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if window is not None and window < layout.longest:
        keys, segments = layout.windowed(window, q.device)
        segments = replace(segments, softcap=softcap)
        return varlen_attention(q, k[keys], v[keys], segments, causal=True, scale=scale, backend=backend)
    if softcap is not None:
        layout, backend = layout.capped(softcap), "math"
    out: Tensor = _SharedPrefixAttention.apply(q, k, v, layout, scale, pick_attention(q, backend))
    return out


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float, backend: Backend
    ) -> Tensor:
        p = layout.prompt_tokens
        to_prompts = for_segments(backend, layout.prompts).forward
        seen, seen_lse = to_prompts(q[:p], k[:p], v[:p], layout.prompts, True, scale)  # [P, H, D], [H, P]
        if len(q) == p:
            out, lse = seen, seen_lse
        else:
            own = backend.forward(q[p:], k[p:], v[p:], layout.completions, True, scale)
            read = backend.forward(q[p:], k[:p], v[:p], layout.across, False, scale)
            out, lse = torch.empty_like(q), seen_lse.new_empty(q.shape[1], len(q))
            out[:p], lse[:, :p] = seen, seen_lse
            merge_attention(*own, *read, out[p:], lse[:, p:])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.backend = layout, scale, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, p = ctx.layout, ctx.layout.prompt_tokens
        grad_out = grad_out.contiguous()

        def gradients(queries: slice, keys: slice, segments: Any, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            lse_part = lse[:, queries].contiguous()
            parts = (grad_out[queries], q[queries], k[keys], v[keys], out[queries], lse_part)
            backward = for_segments(ctx.backend, segments).backward
            result: tuple[Tensor, Tensor, Tensor] = backward(*parts, segments, causal, ctx.scale)
            return result

        prompts, completions = slice(0, p), slice(p, None)
        dq, dk, dv = gradients(prompts, prompts, layout.prompts, True)
        if len(q) > p:
            dq_own, dk_own, dv_own = gradients(completions, completions, layout.completions, True)
            dq_read, dk_read, dv_read = gradients(completions, prompts, layout.across, False)
            prompt = dq, dk, dv
            dq, dk, dv = (torch.empty_like(whole) for whole in (q, k, v))
            dq[:p], dk[p:], dv[p:] = prompt[0], dk_own, dv_own
            torch.add(dq_own, dq_read, out=dq[p:])
            torch.add(prompt[1], dk_read, out=dk[:p])
            torch.add(prompt[2], dv_read, out=dv[:p])
        return dq, dk, dv, None, None, None


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prefix: SharedPrefix | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    assert shared_prefix is not None, "the model does not hand its keywords on to its attention"
    for name in CHANGES:
        if arguments.get(name) is not None:
            raise ValueError(f"shared-prefix attention does not support {name}={arguments[name]!r} of this model.")
    assert attention_mask is None
    assert dropout == 0.0
    # Under autocast, rotated queries and keys arrive in float32, values in half precision.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    with torch.autocast(kind, enabled=False):
        layout, backend = shared_prefix.layout, shared_prefix.backend
        out = shared_prefix_attention(
            q, k, v, layout, scale=scaling, window=sliding_window, softcap=softcap, backend=backend
        )
    return out[None], None


# Registered without a mask function: transformers then builds no mask.
AttentionInterface.register(NAME, _attention_function)


def attend_rotated(
    module: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, shared_prefix: SharedPrefix, **_: Any
) -> Tensor:
    """`fused_text`'s attention."""
    q, k = apply_rotary(q, k, cos, sin)
    with without_autocast(q.device.type):
        layout, backend = shared_prefix.layout, shared_prefix.backend
        return shared_prefix_attention(q, k, v, layout, scale=module.scaling, backend=backend)


def require_support(model: Any) -> None:
    """Raises a ValueError that says why a transformers model cannot be trained on packed groups."""
    name, config = type(model).__name__, model.config.get_text_config()
    linear = linear_layers(model)
    if not linear and not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not take its attention from transformers' AttentionInterface.")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    kinds -= {"linear_attention"} if linear else set()
    if kinds:
        raise ValueError(f"{name} has layers of {', '.join(sorted(kinds))}, which shared prefixes do not know.")
    try:
        changes = {CHANGES[change] for layer in attention_layers(model) for change in layer.changes}
    except HostReadError:  # which is no hindrance here
        changes = set()
    if changes:
        raise ValueError(f"{name} has attention with {', '.join(sorted(changes))}, which shared prefixes do not know.")
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"{name} has config.attention_dropout={dropout}: set it to 0.")


@contextmanager
def shared_prefix_layers(*models: Any) -> Iterator[None]:
    """Within this context, the language models' layers use shared-prefix attention. Enclose forward *and* backward
    passes, since gradient checkpointing runs the forward again. Afterwards the models are restored."""
    configs = [model.config.get_text_config() for model in models]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
