"""Variable-length attention that returns its log-sum-exp, and its backward for a given output and log-sum-exp.

Every backend is a pair of functions over flat tokens, one signature for all:
forward(q, k, v, segments, causal, scale) → out, lse; backward(grad_out, q, k, v, out, lse, segments, causal, scale) →
dq, dk, dv. q [Tq, H, D], k and v [Tk, Hkv, D] with H a multiple of Hkv, lse [H, Tq]. The backward takes the output and
log-sum-exp of the *whole* softmax, even if these keys are only part of it: P = exp(q k scale − lse), and the row sum
of dO · O is the whole one too. So attentions over parts of the keys merge exactly; autograd through a backend's
log-sum-exp would be wrong.
"""

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from fastgrpo.model.segments import Segments
from fastgrpo.settings.run_config import ATTN_BACKENDS

logger = logging.getLogger(__name__)

Gradients = tuple[Tensor, Tensor, Tensor]


class Forward(Protocol):
    """out [Tq, H, D], lse [H, Tq]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    """dq, dk, dv."""

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        causal: bool,
        scale: float,
    ) -> Gradients: ...


class Backend(NamedTuple):
    """An implementation of attention."""

    name: str
    forward: Forward
    backward: Backward


def pick_attention(q: Tensor, forced: str = "auto") -> Backend:
    """The backend for queries [T, H, D], by device, dtype and head size: torch's flash attention for half precision on
    CUDA (`varlen`), torch's flash attention on CPU (`cpu`), else plain torch (`math`). Logged once per choice.

    Raises:
        ValueError: `forced` is unknown, or cannot work on this device, dtype or head size, or is not installed.
    """
    return _pick(forced, q.device.type, q.dtype, q.shape[-1])


@functools.cache
def _pick(forced: str, device: str, dtype: torch.dtype, head_size: int) -> Backend:
    if forced not in ATTN_BACKENDS:
        raise ValueError(f"attn_backend={forced!r} is not valid: use one of {', '.join(ATTN_BACKENDS)}.")
    flash = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    possible = {
        "varlen": flash,
        "cpu": device == "cpu" and dtype != torch.float16,
        "math": True,
        "flash_attn": flash and importlib.util.find_spec("flash_attn") is not None,  # when forced: see its docstring
    }
    name = next(name for name in possible if possible[name]) if forced == "auto" else forced
    if not possible[name]:
        raise ValueError(f"attn_backend={name!r} cannot serve {device}, {dtype}, heads of {head_size} here: use auto.")
    logger.info("attention: %s (%s, %s, heads of %d)", name, device, dtype, head_size)
    return named_backend(name)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ scale) v within each sequence; differentiable in q, k and v.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, Hkv, D], H a multiple of Hkv.
        scale: None is 1 / √D.
        backend: one of `run_config.ATTN_BACKENDS`.

    Returns:
        [Tq, H, D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    chosen = pick_attention(q, backend if segments.softcap is None else "math")
    out: Tensor = _VarlenAttention.apply(q, k, v, segments, causal, scale, for_segments(chosen, segments))
    return out


def for_segments(backend: Backend, segments: Segments) -> Backend:
    """The backend, or plain torch where queries see keys ahead and it takes no mask."""
    return backend if segments.ahead is None or backend.name in ("cpu", "math") else named_backend("math")


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, backend: Backend
    ) -> Tensor:
        out, lse = backend.forward(q, k, v, segments, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings, ctx.backend = (segments, causal, scale), backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.backend.backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *gradients, None, None, None, None


def named_backend(name: str) -> Backend:
    """The backend of that name, whether or not it can run here."""
    if name == "varlen":
        return Backend(name, _varlen_forward, _varlen_backward)
    if name == "flash_attn":
        return Backend(name, _flash_attn_forward, _flash_attn_backward)
    dense_forward, dense_backward = (_cpu_forward, _cpu_backward) if name == "cpu" else (_math_forward, _math_backward)
    return Backend(
        name, functools.partial(_tiled_forward, dense_forward), functools.partial(_tiled_backward, dense_backward)
    )


# Dense attention, tile by tile


class _Tile(NamedTuple):
    """Consecutive segments, right-padded to the longest, so that a causal query never sees padding."""

    q: slice
    k: slice
    lengths: list[int]

    def pad(self, flat: Tensor) -> Tensor:
        """[tokens, H, D] to [n, H, L, D]."""
        if min(self.lengths) == max(self.lengths):
            return flat.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
        return pad_sequence(flat.split(self.lengths), batch_first=True).transpose(1, 2)

    def flatten(self, padded: Tensor) -> Tensor:
        """[n, H, L, D] back to [tokens, H, D]."""
        rows = padded.transpose(1, 2)
        if min(self.lengths) == max(self.lengths):
            return rows.flatten(0, 1)
        return torch.cat([row[:n] for row, n in zip(rows, self.lengths, strict=True)])


def _tiles(segments: Segments, causal: bool) -> Iterator[_Tile]:
    first = q_start = k_start = 0
    for count in segments.tiles:
        lengths = list(segments.q_lengths[first : first + count])
        assert causal or min(lengths) == max(lengths), "without a causal mask padded keys would be seen"
        q_stop = q_start + sum(lengths)
        k_stop = k_start + sum(segments.k_lengths[first : first + count])
        if q_stop > q_start:
            yield _Tile(slice(q_start, q_stop), slice(k_start, k_stop), lengths)
        first, q_start, k_start = first + count, q_stop, k_stop


def _mask(segments: Segments, tile: _Tile, like: Tensor) -> Tensor | None:
    """[L, Lk], 0 where a query sees a key and −inf elsewhere, of a tile of one sequence; None if causality is all."""
    if segments.window is None and segments.ahead is None:
        return None
    count, keys = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
    behind = torch.arange(keys - count, keys, device=like.device)[:, None] - torch.arange(keys, device=like.device)
    hidden = behind < (0 if segments.ahead is None else -segments.ahead[tile.q, None])
    if segments.window is not None:
        hidden |= behind >= segments.window
    return torch.zeros(count, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)


DenseForward = Callable[..., tuple[Tensor, Tensor]]
DenseBackward = Callable[..., Gradients]


def _tiled_forward(
    dense: DenseForward, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for tile in _tiles(segments, causal):
        mask = _mask(segments, tile, q)
        inputs = tile.pad(q[tile.q]), tile.pad(k[tile.k]), tile.pad(v[tile.k])
        tile_out, tile_lse = dense(*inputs, causal and mask is None, scale, mask, segments.softcap)
        out[tile.q] = tile.flatten(tile_out)
        lse[:, tile.q] = tile.flatten(tile_lse[..., None])[..., 0].T
    return out, lse


def _tiled_backward(
    dense: DenseBackward,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> Gradients:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)  # stays 0 for keys that no query sees
    for tile in _tiles(segments, causal):
        # All of these are padded with 0. Padded rows have P = 1 but add nothing, since dO = O = 0.
        tile_grad, tile_q, tile_out = (tile.pad(tensor[tile.q]) for tensor in (grad_out, q, out))
        tile_lse = tile.pad(lse[:, tile.q].T[..., None])[..., 0]
        mask, keys = _mask(segments, tile, q), (tile.pad(k[tile.k]), tile.pad(v[tile.k]))
        rest = causal and mask is None, scale, mask, segments.softcap
        gradients = dense(tile_grad, tile_q, *keys, tile_out, tile_lse, *rest)
        dq[tile.q], dk[tile.k], dv[tile.k] = (tile.flatten(gradient) for gradient in gradients)
    return dq, dk, dv


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    out: Tensor
    assert softcap is None, "a cap takes the math backend"
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def _cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
) -> Gradients:
    gradients: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return gradients


def _math_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    scores = _masked(_scores(q, k, scale, softcap), causal, mask)
    lse = scores.logsumexp(dim=-1)
    out = (scores - lse[..., None]).exp() @ _per_query_head(v, q).to(scores.dtype)
    return out.to(q.dtype), lse


def _math_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
) -> Gradients:
    dtype = lse.dtype
    grad_out, wide_k, wide_v = grad_out.to(dtype), _per_query_head(k, q).to(dtype), _per_query_head(v, q).to(dtype)
    scores = _scores(q, k, scale, softcap)
    probs = (_masked(scores, causal, mask) - lse[..., None]).exp()  # [n, H, L, Lk]
    row_sum = (grad_out * out.to(dtype)).sum(dim=-1, keepdim=True)
    d_scores = probs * (grad_out @ wide_v.transpose(-1, -2) - row_sum) * scale
    if softcap is not None:
        d_scores = d_scores * (1 - (scores / softcap) ** 2)
    dq = (d_scores @ wide_k).to(q.dtype)
    dk, dv = d_scores.transpose(-1, -2) @ q.to(dtype), probs.transpose(-1, -2) @ grad_out
    shared = (k.shape[1], q.shape[1] // k.shape[1])
    return dq, dk.unflatten(1, shared).sum(2).to(k.dtype), dv.unflatten(1, shared).sum(2).to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[n, H, L, Lk], in float32 for half precision."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).transpose(-1, -2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _masked(scores: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    if not causal:
        return scores if mask is None else scores + mask
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -math.inf)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


# Variable-length attention on CUDA


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's flash attention, by its operators, since the public `torch.nn.attention.varlen` hides the backward."""
    out: Tensor
    bounds = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *bounds, 0.0, causal, False, scale=scale, **_window(segments)
    )
    return out, lse


def _varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> Gradients:
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # for dropout, which is off
    unused = torch.empty(0, device=q.device)
    bounds = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
    gradients: Gradients = torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, *bounds, 0.0, causal, seed, unused, scale=scale, **_window(segments)
    )
    return gradients


def _window(segments: Segments) -> dict[str, int]:
    """Arguments of torch's operators: keys seen before a query and after it."""
    return {} if segments.window is None else {"window_size_left": segments.window - 1, "window_size_right": 0}


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn 2.8's own functions. Written against its interface and never run, so only used when forced."""
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    left, right = _window(segments).values() or (-1, -1)
    bounds = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
    out: Tensor
    out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, *bounds, 0.0, scale, causal, left, right)
    return out, lse


def _flash_attn_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> Gradients:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    left, right = _window(segments).values() or (-1, -1)
    bounds = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    interface._flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, dq, dk, dv, *bounds, 0.0, scale, causal, left, right, 0.0, None, False
    )
    return dq, dk, dv
