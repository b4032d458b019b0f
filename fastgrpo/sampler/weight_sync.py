"""From the policy's weights to the sampler's, in place: plain, with LoRA merged on the way, or gathered from ZeRO-3."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.model.families import base_model, text_model
from fastgrpo.model.zero import gathered
from fastgrpo.sampler.decoder import Decoder


@torch.no_grad()
def sync_weights(decoder: Decoder, model: nn.Module) -> None:
    """Copies every weight the decoder needs from the policy, converted to its dtype.

    The policy is left as it is: an adapter's product is added to a copy, W + scaling · B A. Partitioned parameters
    (ZeRO-3) are gathered one module at a time, on every rank, so all ranks must call this together.
    """
    text = text_model(model)
    _copy(text.embed_tokens, decoder.embed)
    for layer, weights in zip(text.layers, decoder.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        _copy(layer.input_layernorm, weights.input_norm)
        _copy_packed([attention.q_proj, attention.k_proj, attention.v_proj], weights.qkv, weights.qkv_bias)
        _copy(attention.o_proj, weights.out)
        _copy(layer.post_attention_layernorm, weights.post_norm)
        _copy_packed([mlp.gate_proj, mlp.up_proj], weights.gate_up)
        _copy(mlp.down_proj, weights.down)
    _copy(text.norm, decoder.final_norm)
    if not decoder.shape.tied_head:
        _copy(base_model(model).lm_head, decoder.head_weight)
    decoder.inverse_frequencies.copy_(text.rotary_emb.inv_freq)
    decoder.rope_scaling = float(text.rotary_emb.attention_scaling)


@torch.no_grad()
def sync_tower(copy: nn.Module, tower: nn.Module) -> None:
    """Fills a copy of the policy's vision tower, one module at a time; all ranks must call this together."""
    for name, module in copy.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if parameters:
            assert parameters.keys() <= {"weight", "bias"}, f"{name} has {sorted(parameters)}"
            _copy(tower.get_submodule(name), parameters["weight"], parameters.get("bias"))


def _copy_packed(modules: Iterable[Any], weight: Tensor, bias: Tensor | None = None) -> None:
    """Several linear layers into one, one after the other along the rows."""
    row = 0
    for module in modules:
        end = row + module.out_features
        _copy(module, weight[row:end], None if bias is None else bias[row:end])
        row = end


def _copy(module: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """A module's weight (and bias) as the forward pass uses it now."""
    if hasattr(module, "modules_to_save"):  # peft trains a copy of the whole module
        module = module.modules_to_save[module.active_adapters[0]]
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    with gathered(module.parameters()):
        merged = base.weight
        for adapter in _adapters(module):
            merged = merged + module.get_delta_weight(adapter).to(merged.dtype)
        weight.copy_(merged)
        if bias is not None:
            bias.copy_(base.bias)


def _adapters(module: Any) -> list[str]:
    """The LoRA adapters whose product the forward pass adds."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A or name in module.lora_embedding_A]
