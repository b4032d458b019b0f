"""Runs a vision tower over the pictures of prompts: the policy's own, or a whole copy where ZeRO-3 partitions it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.model.families import VISION_TOWERS, base_model, family_of
from fastgrpo.model.fused_vision import fused_vision, takes_host_grids
from fastgrpo.model.patch_embed import patches_by_matmul
from fastgrpo.model.picture_styles import Tiles
from fastgrpo.model.segments import Segments, moved, rest_of_run
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.types import Prompt


def vision_tower(model: Any) -> Any | None:
    """The policy's vision tower; None for a text model."""
    inner = getattr(base_model(model), "model", None)
    return next((tower for name in VISION_TOWERS if (tower := getattr(inner, name, None)) is not None), None)


def new_vision_cache(model: Any, max_bytes: int) -> VisionCache | None:
    """A cache of what this model's tower sees; None for a text model."""
    tower, style = vision_tower(model), family_of(base_model(model).config).style
    return None if tower is None else VisionCache(tower, max_bytes, style.layers if isinstance(style, Tiles) else ())


def kept_pictures(
    cache: VisionCache | None, model: Any, digests: Sequence[bytes], grids: Tensor | None
) -> AbstractContextManager[None]:
    """Within this context, the model's tower sees pictures of these rows only where the cache has them not."""
    if cache is None or grids is None:
        return nullcontext()
    return cache.serving(vision_tower(model), digests, family_of(base_model(model).config).style.sizes(grids))


def picture_inputs(model: Any, pixels: Tensor, grids: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass with pictures: `pixels` on its device, their `image_grid_thw` on the host."""
    inputs = family_of(base_model(model).config).style.inputs(pixels, grids)
    if "image_grid_thw" in inputs and not takes_host_grids(vision_tower(model)):
        inputs["image_grid_thw"] = moved(grids, pixels.device)
    return inputs


def seeing_pictures(prompts: Segments, model: Any, input_ids: Tensor) -> Segments:
    """The prompts' attention to themselves: where the family has it so, a picture's tokens see all of it."""
    config = base_model(model).config
    if not family_of(config).whole_pictures:
        return prompts
    return replace(prompts, ahead=rest_of_run(input_ids == config.image_token_id))


def empty_copy(tower: Any, dtype: torch.dtype, device: Any) -> Any:
    """A tower of the same shape, for inference, its weights not yet copied."""
    # Not `_from_config`, which partitions weights under ZeRO-3.
    copy = type(tower)(tower.config).to(device).eval().requires_grad_(False)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)  # parameters alone: rotary frequencies stay in float32
    return copy


def image_features(tower: Any, prompts: Sequence[Prompt], cache: VisionCache | None = None) -> list[Tensor | None]:
    """Per prompt, the features [image tokens, H] of its pictures; None for a prompt without pictures.

    The tower runs once, on all pictures that are not in the cache.
    """
    seen = [p for p in prompts if p.pixel_values is not None]
    if not seen:
        return [None] * len(prompts)
    # Joined on the device: on the host that is one copy more of all pixels.
    pixels = torch.cat([p.pixel_values.to(tower.device) for p in seen if p.pixel_values is not None])
    grids = [p.image_grid_thw for p in seen if p.image_grid_thw is not None]
    digests = [digest for p in seen for digest in p.image_digests]
    was_training = tower.training
    tower.eval()
    try:
        grid = torch.cat(grids) if takes_host_grids(tower) else torch.cat(grids).to(tower.device)
        kept = nullcontext() if cache is None else cache.serving(tower, digests, torch.cat(grids).prod(dim=1).tolist())
        with fused_vision(tower), patches_by_matmul(tower), kept:
            features = tower(pixels.to(tower.dtype), grid_thw=grid)
    finally:
        tower.train(was_training)
    merged = tower.spatial_merge_size**2
    lengths = [int(grid.prod(dim=1).sum()) // merged for grid in grids]
    by_prompt = iter(features.pooler_output.split(lengths))
    return [None if p.pixel_values is None else next(by_prompt) for p in prompts]
