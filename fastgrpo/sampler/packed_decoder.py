"""The packed decoder, with weights of its own: Qwen2 and the text side of Qwen2-VL and Qwen2.5-VL.

It computes what transformers' decoders compute, from a paged KV cache, for one new token per row (`decode`) or for the
tokens of some prompts (`prefill`). Its weights never move, so that a captured CUDA graph stays valid;
`weight_sync` fills and refreshes them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastgrpo_kernels import (
    PagedLayout,
    add_norm,
    decode_attention,
    is_thin,
    rms_norm,
    rope_and_cache,
    swiglu,
    thin_gated_linear,
    thin_linear,
    thin_linear_parts,
)
from fastgrpo_kernels.cpu.linear import lay_out, linear, linear_add
from torch import Tensor

from fastgrpo.model.attention import varlen_attention
from fastgrpo.model.families import FAMILIES, base_model, family_of, mrope_sections, text_model
from fastgrpo.model.segments import Segments
from fastgrpo.sampler.decoder import CacheShape, KVCache

STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary embeddings whose frequencies do not depend on the length so far."""
MOST_LAID_OUT = 1 << 30
"""Bytes of weights, up to which a CPU holds a second copy of them."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape(CacheShape):
    """Sizes and constants of a packed decoder."""

    hidden: int
    intermediate: int
    heads: int
    norm_eps: float
    tied_head: bool
    """The head's weight is the embedding's."""
    mrope_sections: tuple[int, ...] | None
    """How many frequencies rotate by each of the three position axes; None: all by the first."""

    @classmethod
    def of(cls, model: Any) -> "DecoderShape":
        """The shape of a transformers model for which `not_packed` returns None."""
        config = text_model(model).config
        head, embed = base_model(model).lm_head, text_model(model).embed_tokens
        adapted = any(hasattr(module, "active_adapters") for module in (head, embed))
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            tied_head=head.weight is embed.weight and not adapted,
            mrope_sections=mrope_sections(model),
        )


@dataclass(frozen=True)
class LayerWeights:
    """Packed weights of one decoder layer; Hq, Hkv heads of D, hidden size H, intermediate size I."""

    input_norm: Tensor
    """[H]"""
    qkv: Tensor
    """[(Hq + 2 Hkv) · D, H]"""
    qkv_bias: Tensor
    """[(Hq + 2 Hkv) · D]"""
    out: Tensor
    """[H, Hq · D]"""
    post_norm: Tensor
    """[H]"""
    gate_up: Tensor
    """[2 I, H]"""
    down: Tensor
    """[H, I]"""


class Chunk(NamedTuple):
    """Tokens `start` … `end` of one prompt, contiguous in a prefill pass."""

    start: int
    end: int
    pages: Tensor
    """[pages of the prompt] int64."""


class PackedDecoder:
    """Embedding, layers and head over packed weights; no autograd, no modules, no state but the weights."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype, device: Any) -> None:
        """Allocates the weights without filling them."""

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        hidden, attended = shape.hidden, shape.heads * shape.head_dim
        packed = attended + 2 * shape.kv_heads * shape.head_dim
        self.embed = empty(shape.vocabulary, hidden)
        self.layers = [
            LayerWeights(
                input_norm=empty(hidden),
                qkv=empty(packed, hidden),
                qkv_bias=empty(packed),
                out=empty(hidden, attended),
                post_norm=empty(hidden),
                gate_up=empty(2 * shape.intermediate, hidden),
                down=empty(hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        self.final_norm = empty(hidden)
        self.head_weight = self.embed if shape.tied_head else empty(shape.vocabulary, hidden)
        self.laid_out, self.laid_out_head = self.layers, self.head_weight
        """The weights as products read them; see `lay_out`."""
        self.inverse_frequencies = torch.empty(shape.head_dim // 2, dtype=torch.float32, device=device)
        self.rope_scaling = 1.0
        sections = shape.mrope_sections or (shape.head_dim // 2,)
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
        self.rope_axes = torch.tensor(axes, device=device)
        """[D / 2]: which of the three position axes a frequency rotates by."""

    def lay_out(self) -> None:
        """To be called once the weights are filled: copies them to the layout that a CPU's products read fastest.

        A model whose weights alone take more than `MOST_LAID_OUT` keeps to one copy.
        """
        weights = [weight for layer in self.layers for weight in vars(layer).values()]
        if sum(weight.nbytes for weight in [self.head_weight, *weights]) > MOST_LAID_OUT:
            return
        products = ("qkv", "out", "gate_up", "down")
        self.laid_out = [replace(w, **{name: lay_out(getattr(w, name)) for name in products}) for w in self.layers]
        self.laid_out_head = lay_out(self.head_weight)

    def running(self) -> AbstractContextManager[None]:
        """See `Decoder.running`."""
        return nullcontext()

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, layout: PagedLayout, cache: KVCache) -> Tensor:
        """See `Decoder.decode`."""
        cos, sin = self._rotary(positions.unsqueeze(1) * self.inverse_frequencies)
        scale = self.shape.head_dim**-0.5

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            return decode_attention(query, key, value, cos, sin, keys, values, slots, layout, scale=scale)

        hidden = F.embedding(tokens, self.embed)
        if is_thin(hidden):
            return self._logits(self._thin_layers(hidden, attend))
        for layer in range(self.shape.layers):
            hidden = self._layer(layer, hidden, attend)
        return self.head(hidden)

    def prefill(
        self, hidden: Tensor, positions: Tensor, slots: Tensor, chunks: Sequence[Chunk], cache: KVCache
    ) -> Tensor:
        """Writes the keys and values of some prompts' tokens; returns each chunk's last hidden state [chunks, H].

        Args:
            hidden: [T, H], token embeddings with the pictures' features in place; overwritten.
            positions: [3, T] int64.
            slots: [T] int64.
            chunks: consecutive along T; the tokens before a chunk's start are in the cache already.
        """
        angles = positions[self.rope_axes].T.float() * self.inverse_frequencies  # [T, D / 2]
        cos, sin = self._rotary(angles)
        lengths = [chunk.end - chunk.start for chunk in chunks]
        # If every chunk starts its prompt, each attends to itself only: one call for all of them.
        whole = Segments.of(lengths).to(hidden.device) if not any(chunk.start for chunk in chunks) else None

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            query = rope_and_cache(query, key, value, cos, sin, keys, values, slots)
            if whole is not None:
                rotated = keys.flatten(0, 1)[slots]
                return varlen_attention(query, rotated, value, whole, causal=True, scale=self.shape.head_dim**-0.5)
            parts = zip(query.split(lengths), chunks, strict=True)
            return torch.cat([_attend_chunk(part, chunk, keys, values) for part, chunk in parts])

        last = (torch.tensor(lengths).cumsum(0) - 1).to(hidden.device)
        for layer in range(self.shape.layers):
            # The last layer only computes the hidden states that the first new tokens are drawn from.
            kept = last if layer == self.shape.layers - 1 else None
            hidden = self._layer(layer, hidden, attend, kept)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of last hidden states [N, H]."""
        return self._logits(self._norm(hidden, self.final_norm))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Of normed hidden states [N, H]."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # Float32: in half precision a logit of 32, and so its log-prob, is off by 0.06.
            return torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)
        return linear(hidden, self.laid_out_head)

    def _layer(
        self, index: int, hidden: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor], kept: Any = None
    ) -> Tensor:
        """[T, H] → [T, H], or the rows `kept` of it; may overwrite `hidden`."""
        shape, weights = self.shape, self.laid_out[index]
        packed = linear(self._norm(hidden, weights.input_norm), weights.qkv, weights.qkv_bias)
        packed = packed.unflatten(-1, (-1, shape.head_dim))
        query, key, value = packed.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)  # [T, heads, D]
        attended = attend(index, query, key, value).flatten(1)
        if kept is not None:
            hidden, attended = hidden[kept], attended[kept]
        hidden = linear_add(hidden, attended, weights.out)
        gate, up = linear(self._norm(hidden, weights.post_norm), weights.gate_up).chunk(2, dim=-1)
        # On CPU torch's own functions are faster than the reference.
        active = swiglu(gate, up) if hidden.is_cuda else F.silu(gate).mul_(up)
        return linear_add(hidden, active, weights.down)

    def _thin_layers(self, hidden: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """All layers and the last norm for few rows in half precision, [T, H] → [T, H]; overwrites `hidden`.

        A layer takes eight kernels: two norms, four matrix products, attention and its merge. What a product adds to
        `hidden` stays in parts until the norm behind it. Where cuBLAS is faster, the activation is a kernel more.
        """
        shape, parts = self.shape, None
        for index, weights in enumerate(self.layers):
            normed = add_norm(hidden, parts, weights.input_norm, shape.norm_eps)
            packed = thin_linear(normed, weights.qkv, weights.qkv_bias).unflatten(-1, (-1, shape.head_dim))
            query, key, value = packed.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            parts = thin_linear_parts(attend(index, query, key, value).flatten(1), weights.out)
            normed = add_norm(hidden, parts, weights.post_norm, shape.norm_eps)
            parts = thin_linear_parts(thin_gated_linear(normed, weights.gate_up), weights.down)
        return add_norm(hidden, parts, self.final_norm, shape.norm_eps)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of [T, H]."""
        if hidden.is_cuda:
            return rms_norm(hidden, weight, self.shape.norm_eps)[0]
        return F.rms_norm(hidden, (self.shape.hidden,), weight, self.shape.norm_eps)

    def _rotary(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of angles [T, D / 2]."""
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.rope_scaling == 1.0 else (cos * self.rope_scaling, sin * self.rope_scaling)


def _attend_chunk(query: Tensor, chunk: Chunk, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of a chunk's queries [t, Hq, D] to its prompt up to there, read back from the cache."""
    repeats = query.shape[1] // keys.shape[2]
    read = [cache.index_select(0, chunk.pages).flatten(0, 1)[: chunk.end] for cache in (keys, values)]
    key, value = (x.transpose(0, 1).repeat_interleave(repeats, dim=0)[None] for x in read)  # [1, Hq, end, D]
    mask = None
    if chunk.start:
        ends = torch.arange(chunk.start, chunk.end, device=query.device)
        mask = torch.arange(chunk.end, device=query.device) <= ends[:, None]  # [t, end]
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, attn_mask=mask, is_causal=mask is None
    )
    return attended[0].transpose(0, 1)


def not_packed(model: Any) -> str | None:
    """Why the packed decoder cannot compute this model; None when it can."""
    config = base_model(model).config
    if not family_of(config).has_packed_decoder:
        known = ", ".join(name for known in FAMILIES if known.has_packed_decoder for name in known.model_types)
        return f"model type {config.model_type} is none of {known}"
    text = text_model(model).config
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "it uses sliding-window attention"
    if text.hidden_act != "silu":
        return f"its activation is {text.hidden_act}, not silu"
    rope = text.rope_parameters.get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"its rotary embedding is of type {rope}"
    return None
