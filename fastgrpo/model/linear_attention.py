"""Layers of linear attention (the gated delta rule: Qwen3-Next, Qwen3.5) that start where their prompt ended.

What they do to a token by itself (projections, gated norm) is done to all tokens at once, by the modules' own children.
Between lie a short convolution and the rule, from a state: what the convolution saw last, and the recurrent state. Over
whole sequences both are the functions of transformers, which are flash-linear-attention's and causal-conv1d's where
those are installed.
"""

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN

from fastgrpo.model.families import base_model

CLASSES = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")


class State(NamedTuple):
    """Of n sequences, after some tokens."""

    convolution: Tensor
    """[n, kernel − 1, channels], the last inputs of the convolution."""
    recurrent: Tensor
    """[n, value heads, key size, value size]."""


class Tokens(NamedTuple):
    """What a layer makes of T tokens, each by itself."""

    mixed: Tensor
    """[T, channels]: queries, keys and values before the convolution."""
    gate: Tensor
    """[T, value heads, value size]."""
    beta: Tensor
    """[T, value heads]: how much of a value is written."""
    decay: Tensor
    """[T, value heads] float32: logarithm of what is kept of the state."""

    def part(self, start: int, end: int) -> "Tokens":
        """Tokens `start` … `end`."""
        return Tokens(*(field[start:end] for field in self))


def linear_layers(model: Any) -> dict[int, Any]:
    """The linear attention modules of a model, by the index of their layer."""
    return {module.layer_idx: module for module in base_model(model).modules() if type(module).__name__ in CLASSES}


def project(module: Any, hidden: Tensor) -> Tokens:
    """Of hidden states [T, H]."""
    if hasattr(module, "in_proj_qkvz"):  # Qwen3-Next: one product, by key heads
        whole = module.in_proj_qkvz(hidden)[None], module.in_proj_ba(hidden)[None]
        *parts, gate, b, a = (part[0] for part in module.fix_query_key_value_ordering(*whole))
        mixed = torch.cat([part.flatten(1) for part in parts], dim=-1)
    else:
        mixed, gate = module.in_proj_qkv(hidden), module.in_proj_z(hidden).unflatten(-1, (-1, module.head_v_dim))
        b, a = module.in_proj_b(hidden), module.in_proj_a(hidden)
    return Tokens(mixed, gate, b.sigmoid(), -module.A_log.float().exp() * F.softplus(a.float() + module.dt_bias))


def run_sequences(
    module: Any, tokens: Tokens, lengths: Sequence[int], start: State | None = None
) -> tuple[Tensor, State]:
    """Outputs [T, value heads, value size] of n sequences that lie one after another; without `start` also the states
    after them, else of no use.

    As one padded batch, which is exact: zeros leave the convolution and the state as they are.
    """
    side: Literal["left", "right"] = "left" if start is None else "right"
    mixed, beta, decay = (_padded(part, lengths, side) for part in (tokens.mixed, tokens.beta, tokens.decay))
    kept = module.conv_kernel_size - 1
    before = mixed.new_zeros(len(mixed), kept, mixed.shape[2]) if start is None else start.convolution.to(mixed.dtype)
    whole = torch.cat([before, mixed], dim=1)  # [n, kept + longest, channels]
    functions = sys.modules[type(module).__module__]
    weight = module.conv1d.weight.squeeze(1)
    found = functions.causal_conv1d_fn(whole.transpose(1, 2), weight, module.conv1d.bias, activation=module.activation)
    query, key, value = (
        found[..., kept:].transpose(1, 2).split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    )
    out, recurrent = functions.torch_chunk_gated_delta_rule(
        query.unflatten(-1, (-1, module.head_k_dim)),
        key.unflatten(-1, (-1, module.head_k_dim)),
        value.unflatten(-1, (-1, module.head_v_dim)),
        g=decay,
        beta=beta,
        initial_state=None if start is None else start.recurrent,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return _unpadded(out, lengths, side), State(whole[:, whole.shape[1] - kept :], recurrent)


def run_token(module: Any, tokens: Tokens, state: State, active: Tensor) -> Tensor:
    """Outputs [B, value heads, value size] of one more token in each row; states of `active` [B] rows move on in place.

    With the state S before, decay a, and δ = β (v − a kᵀS): S becomes a S + k δᵀ, so its output is a qᵀS + (qᵀk) δ.
    """
    convolution, recurrent = state
    window = torch.cat([convolution, tokens.mixed.to(convolution.dtype).unsqueeze(1)], dim=1)  # [B, kernel, channels]
    torch.where(active[:, None, None], window[:, 1:], convolution, out=convolution)
    found = ACT2FN[module.activation]((window * module.conv1d.weight.squeeze(1).T).sum(dim=1)).to(recurrent.dtype)
    pairs, value = found.split([2 * module.key_dim, module.value_dim], dim=-1)
    value = value.unflatten(-1, (-1, module.head_v_dim))
    pairs = pairs.unflatten(-1, (2, -1, module.head_k_dim)).transpose(1, 2)  # [B, key heads, 2, key size]
    pairs = pairs * torch.rsqrt(pairs.square().sum(dim=-1, keepdim=True) + 1e-6)
    pairs = pairs.repeat_interleave(value.shape[1] // pairs.shape[1], dim=1)  # [B, value heads, 2, key size]
    query, key = pairs.unbind(dim=2)
    keep = torch.where(active[:, None], tokens.decay, 0.0).exp()[..., None]
    write = torch.where(active[:, None], tokens.beta, 0.0)[..., None]
    seen, read = (pairs @ recurrent * keep.unsqueeze(-1)).unbind(dim=2)  # [B, value heads, value size] each
    change = write * (value - read)
    recurrent.mul_(keep.unsqueeze(-1)).addcmul_(key.unsqueeze(-1), change.unsqueeze(-2))
    out = torch.addcmul(seen, (query * key).sum(dim=-1, keepdim=True), change)
    return (out * module.head_k_dim**-0.5).to(tokens.gate.dtype)


def finish(module: Any, out: Tensor, gate: Tensor) -> Tensor:
    """Hidden states [T, H] of outputs and gates [T, value heads, value size]."""
    normed = module.norm(out.flatten(0, 1), gate.flatten(0, 1))
    hidden: Tensor = module.out_proj(normed.view(len(out), -1))
    return hidden


def _padded(tokens: Tensor, lengths: Sequence[int], side: Literal["left", "right"]) -> Tensor:
    """[T, …] → [n, longest, …]."""
    if len(set(lengths)) == 1:
        return tokens.unflatten(0, (len(lengths), -1))
    return pad_sequence(tokens.split(list(lengths)), batch_first=True, padding_side=side)


def _unpadded(rows: Tensor, lengths: Sequence[int], side: Literal["left", "right"]) -> Tensor:
    """[n, longest, …] → [T, …]."""
    if len(set(lengths)) == 1:
        return rows.flatten(0, 1)
    pairs = zip(rows, lengths, strict=True)
    return torch.cat([row[len(row) - n :] if side == "left" else row[:n] for row, n in pairs])
