"""Fuses blocks of Qwen-like vision towers, with one variable-length attention for all pictures, within a context."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

from fastgrpo_kernels import apply_rotary
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from fastgrpo.model.attention import varlen_attention
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
from fastgrpo.model.segments import Segments, moved

TOWERS = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel")
BLOCKS = ("Qwen2VLVisionBlock", "Qwen2_5_VLVisionBlock")
"""x + attn(norm1(x)), then x + mlp(norm2(x))."""
ATTENTIONS = ("VisionAttention", "Qwen2_5_VLVisionAttention")


def takes_host_grids(tower: Any) -> bool:
    """Whether the fused tower takes its grids [pictures, 3] from the host; it then reads nothing from the device."""
    return class_of(tower) in TOWERS


@contextmanager
def fused_vision(*towers: Any, backend: str = "auto") -> Iterator[None]:
    """Within this context, these vision towers (None is skipped) run fused kernels where their classes are known.

    Args:
        backend: of the attention, one of `run_config.ATTN_BACKENDS`.
    """
    known = [tower for tower in dict.fromkeys(towers) if takes_host_grids(tower)]  # two models may be one
    blocks = [block for tower in known for block in tower.blocks]
    attentions = [block.attn for block in blocks if is_known(block.attn, ATTENTIONS)]
    whole = [block for block in blocks if is_known(block, BLOCKS) and is_norm(block.norm1) and is_norm(block.norm2)]
    with fused_modules(*towers), ExitStack() as stack:
        for tower in known:
            stack.enter_context(replaced_forward(tower, partial(_tower, tower, tower.forward)))
        for attention in attentions:
            stack.enter_context(replaced_forward(attention, partial(_attention, attention, backend)))
        for block in whole:
            stack.enter_context(replaced_class(block, _fused(block.__class__)))
        log_fused(known + attentions + whole)
        yield


def picture_segments(lengths: Sequence[int]) -> Segments:
    """Segments of pictures or windows with these patch counts; equal neighbours share a tile."""
    return Segments.of(lengths, tiles=[len(list(equal)) for _, equal in groupby(lengths)])


def _tower(tower: Any, own: Any, pixel_values: Tensor, grid_thw: Tensor, **arguments: Any) -> Any:
    """Passes the tower what it would compute from grids on the device, reading back in every block."""
    grids = grid_thw.cpu()
    device = pixel_values.device
    segments = [picture_segments([h * w for t, h, w in grids.tolist() for _ in range(t)])]
    arguments["position_ids"] = moved(get_vision_position_ids(grids, tower.spatial_merge_size), device)
    if hasattr(tower, "window_size"):
        index, starts = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        segments.append(picture_segments(starts.diff().tolist()))
        arguments["window_index"] = moved(index, device)
    segments = [part.to(device) for part in segments]
    arguments["cu_seqlens"] = segments[0].cu_q
    if hasattr(tower, "window_size"):
        arguments["cu_window_seqlens"] = segments[1].cu_q
    return own(pixel_values, grid_thw=grids, segments=tuple(segments), **arguments)


def _attention(
    attention: Any,
    backend: str,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    segments: tuple[Segments, ...],
    **arguments: Any,
) -> Any:
    """`segments`: candidates; the one with starts `cu_seqlens` is used."""
    chosen = next(part for part in segments if part.cu_q is cu_seqlens)
    q, k, v = attention.qkv(hidden_states).view(len(hidden_states), 3, attention.num_heads, -1).unbind(1)
    q, k = apply_rotary(q, k, *position_embeddings)
    with without_autocast(q.device.type):
        out = varlen_attention(q, k, v, chosen, scale=attention.scaling, backend=backend)
    return attention.proj(out.flatten(1))


@functools.cache
def _fused(kind: type) -> type:
    """A subclass of this block class that adds the residual and normalises in one kernel."""
    return type(f"Fused{kind.__name__}", (kind,), {"forward": _block})


def _block(block: Any, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    x = hidden_states.to(stream_dtype(hidden_states.dtype, hidden_states.device.type))
    normed, x = block.norm1(x, None)
    normed, x = block.norm2(block.attn(normed, *arguments, **keywords), x)
    out: Tensor = x + block.mlp(normed)
    return out
