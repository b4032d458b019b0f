"""The elementwise parts of a transformer layer: norms, activations, rotary embedding, merge of attentions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = s / √(mean s² + eps) · weight and s = x + residual, both [..., H] in x's dtype (arXiv 1910.07467)."""
    total = x if residual is None else x + residual
    dtype = computing_dtype(x)
    return torch.rms_norm(total.to(dtype), x.shape[-1:], weight.to(dtype), eps).to(x.dtype), total


def add_norm(hidden: Tensor, parts: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden [T, H] += Σ parts [S, T, H], in place; then its RMSNorm, in its dtype."""
    if parts is not None:
        hidden.copy_(hidden.to(computing_dtype(hidden)) + parts.sum(0))
    return rms_norm(hidden, weight, eps)[0]


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, in x's dtype."""
    dtype = computing_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def thin_linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ as one part: [1, T, N] float32."""
    return F.linear(x.float(), weight.float())[None]


def thin_gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x gateᵀ) · (x upᵀ) for weight [gate; up], in x's dtype."""
    dtype = computing_dtype(x)
    gate, up = F.linear(x.to(dtype), weight.to(dtype)).chunk(2, dim=-1)
    return swiglu(gate, up).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = (s − mean s) / √(var s + eps) · weight + bias and s = x + residual, both [..., H] in x's dtype."""
    total = x if residual is None else x + residual
    dtype = computing_dtype(x)
    shape, wide = x.shape[-1:], total.to(dtype)
    return torch.layer_norm(wide, shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape, in their dtype (arXiv 2002.05202)."""
    return (F.silu(gate.to(computing_dtype(gate))) * up).to(gate.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), in x's dtype."""
    wide = x.to(computing_dtype(x))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + rotate_half(x) · sin of queries [T, Hq, D] and keys [T, Hkv, D]; cos and sin [T, D]."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]).to(x.dtype)


def merge_attention(
    first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Writes softmax attention over two sets of keys, from that over each and its log-sum-exp: [T, H, D] and [H, T]."""
    torch.logaddexp(first_lse, second_lse, out=lse)
    shares = [(part - lse).exp().T[..., None] for part in (first_lse, second_lse)]  # [T, H, 1]
    out.copy_(first * shares[0] + second * shares[1])
