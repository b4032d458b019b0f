"""The generic decoder: any decoder family's own transformers layers over the paged cache.

It reads the policy's weights where they lie. Where their dtype is not the sampler's, or ZeRO-3 has partitioned them, it
keeps a whole copy, into which adapters are merged.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from fastgrpo_kernels import PagedLayout
from torch import Tensor, nn

from fastgrpo.model.families import base_model, learns_prompt, mrope_sections
from fastgrpo.model.fused_vision import fused_vision
from fastgrpo.model.linear_attention import linear_layers
from fastgrpo.model.patch_embed import patches_by_matmul
from fastgrpo.model.probe import CHANGES, attention_layers
from fastgrpo.model.replaced_forward import replaced_forward
from fastgrpo.model.segments import Segments, moved
from fastgrpo.model.vision import kept_pictures, picture_inputs, seeing_pictures, vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.model.zero import is_partitioned
from fastgrpo.sampler.decoder import CacheShape, KVCache
from fastgrpo.sampler.paged_layers import PagedStep, paged_layers
from fastgrpo.sampler.sequence import PromptGroup
from fastgrpo.sampler.weight_sync import empty_model, not_mergeable, sync_module

LENGTH_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest sequence of a batch."""


def generic_shape(model: Any) -> CacheShape:
    """The cache that a model's layers need.

    Raises:
        ValueError: a model that the generic decoder cannot run; the message says why.
    """
    policy = base_model(model)
    config, name = policy.config.get_text_config(), type(policy).__name__
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in LENGTH_ROPE:
        raise ValueError(f"its rotary embedding is of type {rope}, whose angles depend on the longest row")
    if learns_prompt(model):
        raise ValueError("it is tuned by a learnt prompt")
    layers = attention_layers(model)
    changes = sorted({change for layer in layers for change in layer.changes})
    if changes:
        raise ValueError(f"its attention has {', '.join(CHANGES[change] for change in changes)}")
    linear = [module for _, module in sorted(linear_layers(model).items())]
    if [layer.index for layer in layers] != _attention_indices(model):
        raise ValueError(f"{len(layers)} of its {config.num_hidden_layers} layers are attention of their own")
    sizes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers}
    if len(sizes) > 1 or layers[0].key_dim != layers[0].value_dim or layers[0].key_dim % 2:
        raise ValueError(f"{name}'s layers have keys and values of several sizes, (heads, key, value): {sorted(sizes)}")
    states = [
        size
        for module in linear
        for size in (
            (module.conv_kernel_size - 1, module.conv_dim),
            (module.num_v_heads, module.head_k_dim, module.head_v_dim),
        )
    ]
    return CacheShape(
        layers=len(layers),
        kv_heads=layers[0].kv_heads,
        head_dim=layers[0].key_dim,
        vocabulary=config.vocab_size,
        state_sizes=tuple(states),
    )


def _attention_indices(model: Any) -> list[int]:
    """Of the layers that are not linear attention."""
    count, linear = base_model(model).config.get_text_config().num_hidden_layers, linear_layers(model)
    return [i for i in range(count) if i not in linear]


class GenericDecoder:
    """`Decoder` of a model's own modules."""

    def __init__(self, model: Any, shape: CacheShape, dtype: torch.dtype, device: Any) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        self.axes = 3 if mrope_sections(model) else 1
        self.places = {index: place for place, index in enumerate(_attention_indices(model))}
        self.model = base_model(model)
        """What runs: the policy itself, or the copy."""
        self.copy: Any = None

    def sync(self, model: Any) -> None:
        """Takes over the policy's weights: by reading them in place, else into the copy. Under ZeRO-3 all ranks
        together.

        Raises:
            ValueError: adapters that cannot be merged into a copy.
        """
        policy = base_model(model)
        weight = policy.get_input_embeddings().weight
        in_place = weight.dtype == self.dtype and weight.device.type == self.device.type
        if self.copy is None and in_place and not is_partitioned(policy.parameters()):
            self.model = policy
            return
        if self.copy is None:
            if reason := not_mergeable(policy):
                raise ValueError(f"the sampler needs a copy of the policy's weights, but {reason}.")
            self.copy = empty_model(policy, self.dtype, self.device)
        sync_module(self.copy, policy)
        self.model = self.copy

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Decoder.running`: paged attention, no dropout, no checkpointing."""
        was_training = self.model.training
        head = self.model.get_output_embeddings()
        with ExitStack() as stack:
            stack.enter_context(paged_layers(self.model))
            if type(head) is nn.Linear and head.bias is None:
                stack.enter_context(replaced_forward(head, partial(_logits, head)))
            if was_training:
                self.model.eval()
                stack.callback(self.model.train)
            yield

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, layout: PagedLayout, cache: KVCache) -> Tensor:
        """See `Decoder.decode`."""
        return self(tokens, positions.expand(self.axes, -1), PagedStep(cache, slots, layout, None, self.places))

    def __call__(self, tokens: Tensor, positions: Tensor, step: PagedStep, **inputs: Any) -> Tensor:
        """Logits [N, V] of tokens [T] at positions [axes, T]."""
        logits: Tensor = self.model(
            input_ids=tokens[None],
            attention_mask=None,
            position_ids=positions[:, None] if self.axes == 3 else positions,
            use_cache=False,
            paged=step,
            **inputs,
        ).logits[0]
        return logits


def _logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """In float32 on a GPU: in half precision a logit of 32, and so its log-prob, is off by 0.06."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden[0], head.weight.T, out_dtype=torch.float32)[None]
    return nn.functional.linear(hidden, head.weight)


class GenericPrefill:
    """Runs whole prompts, with their pictures, through the model's own forward pass."""

    def __init__(self, decoder: GenericDecoder, max_tokens: int, vision_cache: VisionCache | None) -> None:
        """`max_tokens`: of a pass; a longer prompt is not split."""
        self.decoder = decoder
        self.max_tokens = max_tokens
        self.vision_cache = vision_cache

    def run(self, groups: Sequence[PromptGroup], cache: KVCache, page_size: int) -> None:
        """Fills the pages of the groups' prompts and sets their `first_logits`."""
        for some in _passes(groups, self.max_tokens):
            logits = self._logits(some, cache, page_size)
            for row, group in enumerate(some):
                group.first_logits = logits[row : row + 1]

    def _logits(self, groups: Sequence[PromptGroup], cache: KVCache, page_size: int) -> Tensor:
        """[groups, V], of each prompt's last token."""
        device, prompts = self.decoder.device, [group.prompt for group in groups]
        lengths = [group.length for group in groups]
        slots = []
        for group in groups:
            at = torch.arange(group.length)
            slots.append(torch.tensor(group.pages)[at // page_size] * page_size + at % page_size)
        inputs: dict[str, Any] = {"logits_to_keep": moved(torch.tensor(lengths).cumsum(0) - 1, device)}
        tower = vision_tower(self.decoder.model)
        grids = None
        pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        if pixels:
            grids = torch.cat([p.image_grid_thw for p in prompts if p.image_grid_thw is not None])
            pixel_values = moved(torch.cat(pixels), device).to(self.decoder.dtype)
            inputs |= picture_inputs(self.decoder.model, pixel_values, grids)
        positions = torch.cat([p.position_ids for p in prompts], dim=1)[: self.decoder.axes]
        segments = Segments.of(lengths).to(device)
        tokens = moved(torch.cat([p.input_ids for p in prompts]), device)
        if pixels:
            segments = seeing_pictures(segments, self.decoder.model, tokens)
        step = PagedStep(cache, moved(torch.cat(slots), device), None, segments, self.decoder.places)
        digests = [digest for prompt in prompts for digest in prompt.image_digests]
        kept = kept_pictures(self.vision_cache, self.decoder.model, digests, grids)
        with fused_vision(tower), patches_by_matmul(tower), kept:
            logits = self.decoder(tokens, moved(positions, device), step, **inputs)
        for i, group in enumerate(groups):
            group.states = tuple(part[i : i + 1] for state in step.prompt_states for part in state)
        return logits


def _passes(groups: Sequence[PromptGroup], max_tokens: int) -> Iterator[list[PromptGroup]]:
    """Consecutive groups of at most `max_tokens` tokens together, at least one."""
    some: list[PromptGroup] = []
    for group in groups:
        if some and sum(g.length for g in some) + group.length > max_tokens:
            yield some
            some = []
        some.append(group)
    if some:
        yield some
