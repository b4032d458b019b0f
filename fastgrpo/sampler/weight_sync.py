"""Copies the policy's weights to the sampler's, in place; merges LoRA, gathers ZeRO-3 partitions, reads 4-bit ones."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.model.families import base_model, text_model
from fastgrpo.model.quantized import plain_weight
from fastgrpo.model.zero import gathered, is_partitioned
from fastgrpo.sampler.decoder import Decoder


@torch.no_grad()
def sync_weights(decoder: Decoder, model: nn.Module) -> None:
    """Copies every weight the decoder needs from the policy, converted to its dtype.

    The policy is left as it is: an adapter's product is added to a copy, W + scaling · B A. Partitioned parameters
    (ZeRO-3) are gathered one module at a time, on every rank, so all ranks must call this together.

    A 2B model with float32 weights reads 6.2 GB and writes 3.1 GB: 3.1 ms at 3 TB/s. With one launch per parameter, an
    H100 took 7.1 ms.
    """
    text, waiting = text_model(model), _Waiting()
    _copy(text.embed_tokens, decoder.embed, None, waiting)
    for layer, weights in zip(text.layers, decoder.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        _copy(layer.input_layernorm, weights.input_norm, None, waiting)
        _copy_packed([attention.q_proj, attention.k_proj, attention.v_proj], weights.qkv, weights.qkv_bias, waiting)
        _copy(attention.o_proj, weights.out, None, waiting)
        _copy(layer.post_attention_layernorm, weights.post_norm, None, waiting)
        _copy_packed([mlp.gate_proj, mlp.up_proj], weights.gate_up, None, waiting)
        _copy(mlp.down_proj, weights.down, None, waiting)
    _copy(text.norm, decoder.final_norm, None, waiting)
    if not decoder.shape.tied_head:
        _copy(base_model(model).lm_head, decoder.head_weight, None, waiting)
    waiting.copy()
    decoder.inverse_frequencies.copy_(text.rotary_emb.inv_freq)
    decoder.rope_scaling = float(text.rotary_emb.attention_scaling)


@torch.no_grad()
def sync_tower(copy: nn.Module, tower: nn.Module) -> None:
    """Fills a copy of the policy's vision tower, one module at a time; all ranks must call this together."""
    waiting = _Waiting()
    for name, module in copy.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if parameters:
            assert parameters.keys() <= {"weight", "bias"}, f"{name} has {sorted(parameters)}"
            _copy(tower.get_submodule(name), parameters["weight"], parameters.get("bias"), waiting)
    waiting.copy()


class _Waiting:
    """Pending copies of unpartitioned parameters, made together in a few launches instead of one each."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, target: Tensor, source: Tensor) -> None:
        kind = (target.dtype, target.device, source.dtype, source.device)
        targets, sources = self.pairs.setdefault(kind, ([], []))
        targets.append(target)
        sources.append(source)

    def copy(self) -> None:
        for targets, sources in self.pairs.values():
            torch._foreach_copy_(targets, sources)
        self.pairs.clear()


def _copy_packed(modules: Iterable[Any], weight: Tensor, bias: Tensor | None, waiting: _Waiting) -> None:
    """Copies several linear layers into one, stacked along the rows."""
    row = 0
    for module in modules:
        end = row + module.out_features
        _copy(module, weight[row:end], None if bias is None else bias[row:end], waiting)
        row = end


def _copy(module: Any, weight: Tensor, bias: Tensor | None, waiting: _Waiting) -> None:
    """Copies a module's weight (and bias) as its forward pass uses it now: at once, or with the pending copies."""
    if hasattr(module, "modules_to_save"):  # peft trains a copy of the whole module
        module = module.modules_to_save[module.active_adapters[0]]
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    parameters, adapters = list(module.parameters()), _adapters(module)
    if not adapters and not is_partitioned(parameters):
        waiting.add(weight, plain_weight(base))
        if bias is not None:
            waiting.add(bias, base.bias)
        return
    with gathered(parameters):
        merged = plain_weight(base)
        for adapter in adapters:
            merged = merged + module.get_delta_weight(adapter).to(merged.dtype)
        weight.copy_(merged)
        if bias is not None:
            bias.copy_(base.bias)


def _adapters(module: Any) -> list[str]:
    """The LoRA adapters whose product the forward pass adds."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A or name in module.lora_embedding_A]
