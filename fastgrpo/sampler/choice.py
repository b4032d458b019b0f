"""Chooses the decoder of a model: packed where its family has one, else generic."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from fastgrpo.model.families import base_model, learns_prompt, text_model
from fastgrpo.model.vision import empty_copy, vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.model.zero import is_partitioned
from fastgrpo.sampler.decoder import Decoder
from fastgrpo.sampler.generic_decoder import GenericDecoder, GenericPrefill, generic_shape
from fastgrpo.sampler.packed_decoder import DecoderShape, PackedDecoder, not_packed
from fastgrpo.sampler.prefill import Prefill
from fastgrpo.sampler.weight_sync import not_mergeable, sync_module, sync_weights


class Parts(NamedTuple):
    """What an engine runs."""

    decoder: Decoder
    prefill: Prefill | GenericPrefill
    sync: Callable[[Any], None]
    """Takes over the weights of the policy, wrapped or not; under ZeRO-3 on all ranks together."""


def is_packed(model: Any) -> bool:
    """Whether the sampler runs a model from packed weights of its own."""
    return not_packed(model) is None and _not_mergeable(model) is None


def unsupported(model: Any) -> str | None:
    """Why the sampler cannot run this model; None when it can."""
    if is_packed(model):
        return None
    try:
        generic_shape(model)
    except ValueError as error:
        return str(error)
    return None


def build_parts(
    model: Any,
    dtype: torch.dtype,
    device: Any,
    max_tokens: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    vision_cache: VisionCache | None,
) -> Parts:
    """The decoder and prefill of a model.

    Args:
        max_tokens: of a prefill pass.
        autocast: the context that the policy's own vision tower runs in.

    Raises:
        ValueError: a model that the sampler cannot run; the message is `unsupported`'s.
    """
    if is_packed(model):
        packed = PackedDecoder(DecoderShape.of(model), dtype, device)
        image_token = getattr(base_model(model).config, "image_token_id", None)
        prefill = Prefill(packed, vision_tower(model), image_token, max_tokens, autocast, vision_cache)
        return Parts(packed, prefill, lambda policy: _sync_packed(packed, prefill, policy))
    shape = generic_shape(model)
    policy = base_model(model)
    if policy.get_input_embeddings().weight.dtype != dtype and (reason := not_mergeable(policy)):
        raise ValueError(f"{reason}, so no copy of them in {dtype} can be made")
    generic = GenericDecoder(model, shape, dtype, device)
    return Parts(generic, GenericPrefill(generic, max_tokens, vision_cache), generic.sync)


def _not_mergeable(model: Any) -> str | None:
    if learns_prompt(model):
        return "it is tuned by a learnt prompt"
    return not_mergeable(text_model(model), base_model(model).lm_head)


def _sync_packed(decoder: PackedDecoder, prefill: Prefill, policy: Any) -> None:
    sync_weights(decoder, policy)
    tower = vision_tower(policy)
    if tower is not None and is_partitioned(tower.parameters()):
        # Gathering needs all ranks at once, but ranks encode pictures at different times: each gets a copy.
        if prefill.tower is tower:
            prefill.tower = empty_copy(tower, decoder.dtype, decoder.device)
        sync_module(prefill.tower, tower)
