"""Runs a transformers model on a packed batch: log-probs of its completion tokens, without storing logits.

Everything happens inside one call of the (wrapped) model, so the hooks of DDP and DeepSpeed (ZeRO-3 too) see an
ordinary forward pass. transformers embeds tokens and pictures and runs the decoder; the attention is replaced through
the layout keyword (`shared_prefix`), and during the call the fused log-prob replaces the head.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from fastgrpo_kernels import LogprobOutput, linear_logprob, logprob_from_logits
from fastgrpo_profiling import span
from torch import Tensor, nn

from fastgrpo.model.families import (
    base_model,
    family_of,
    is_multimodal,
    learns_prompt,
    mrope_sections,
    patch_sizes,
    unwrap,
)
from fastgrpo.model.float32_head import float32_logits
from fastgrpo.model.logit_formula import linear_logits, logit_formula
from fastgrpo.model.picture_styles import Tiles
from fastgrpo.model.replaced_forward import replaced_forward
from fastgrpo.model.vision import kept_pictures, picture_inputs, seeing_pictures
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.types import Prompt
from fastgrpo.update.packing import PackedBatch
from fastgrpo.update.shared_prefix import SharedPrefix, require_support


def require_packed_support(model: Any) -> None:
    """Raises a ValueError that says why a model cannot be trained on packed groups, if so."""
    require_support(model)
    if learns_prompt(model):
        raise ValueError("a learnt prompt (prefix or prompt tuning) stands before every sequence, not once in a pack.")
    if is_multimodal(model):
        dummy_image_prompt(model)


def packed_logprobs(
    model: Any,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    attn_backend: str = "auto",
    logprob_bytes: int | None = None,
    vision_cache: VisionCache | None = None,
    float32_head: bool = False,
) -> LogprobOutput:
    """Log-probs and entropies [N] float32 of a batch's completion tokens, with gradient.

    Call it, and the backward pass, within `shared_prefix_layers(unwrap(model))`.

    Args:
        model: a transformers model, or one wrapped in peft, DDP or a DeepSpeed engine.
        batch: on the model's device.
        attn_backend: one of `run_config.ATTN_BACKENDS`.
        logprob_bytes: scratch of the head, `linear_logprob`'s byte budget; None: by free memory.
        vision_cache: features of pictures, if the tower is frozen.
        float32_head: the head's product in float32.
    """
    pictures, layout = {}, batch.layout
    if batch.pixel_values is not None and batch.image_grid_thw is not None:
        pictures = picture_inputs(model, batch.pixel_values, batch.image_grid_thw)
        ids = batch.input_ids[: layout.prompt_tokens]
        layout = replace(layout, prompts=seeing_pictures(layout.prompts, model, ids))
    options = {"temperature": temperature, "entropy": entropy}
    head = _logprob_head(unwrap(model), batch, options, logprob_bytes, float32_head)
    with linear_logits(model), head, kept_pictures(vision_cache, model, batch.image_digests, batch.image_grid_thw):
        found = model(
            input_ids=batch.input_ids[None],
            attention_mask=None,
            # Always passed: transformers might otherwise reuse values of the last `generate`.
            position_ids=batch.position_ids[:, None] if mrope_sections(model) else batch.position_ids[:1],
            **pictures,
            use_cache=False,
            shared_prefix=SharedPrefix(layout, attn_backend),
        ).logits
    return LogprobOutput(*found.unbind()) if entropy else LogprobOutput(found[0], None)


def _logprob_head(
    model: Any, batch: PackedBatch, options: dict[str, Any], byte_budget: int | None, float32: bool
) -> AbstractContextManager[None]:
    """Within this context, the model's head maps [1, T, H] to log-probs and entropies [2, N] instead of logits."""
    head = model.get_output_embeddings()
    own_forward, formula = head.forward, logit_formula(model)
    if formula.softcap is None:
        options = options | {"temperature": options["temperature"] / formula.scale}

    def forward(hidden: Tensor) -> Tensor:
        # Autocast would have the head's product in half precision.
        whole = torch.autocast(hidden.device.type, enabled=False) if float32 else nullcontext()
        # Without gradients it belongs to the pass of the reference, or of the old log-probs.
        with whole, span("update/head") if torch.is_grad_enabled() else nullcontext():
            if type(head) is nn.Linear and head.bias is None and formula.softcap is None:
                x, weight = (hidden[0].float(), head.weight.float()) if float32 else (hidden[0], head.weight)
                output = linear_logprob(x, weight, batch.targets, rows=batch.rows, byte_budget=byte_budget, **options)
            else:  # adapters, a bias, a quantized head, a cap
                rows = hidden[0, batch.rows]
                logits = float32_logits(head, rows) if float32 else own_forward(rows)
                capped = logits if formula.softcap is None else formula.capped(logits * formula.scale)
                output = logprob_from_logits(capped, batch.targets, **options)
        return torch.stack([part for part in output if part is not None])

    return replaced_forward(head, forward)


def dummy_image_prompt(model: Any) -> Prompt:
    """The smallest prompt with a picture (a merged patch, or few tiles), for gradients through the vision tower.

    Raises:
        ValueError: a family whose pictures are not known.
    """
    family = family_of(base_model(model).config)
    if isinstance(style := family.style, Tiles):
        grids = style.smallest()
        places = sum(style.places(grids, 1))
        return Prompt(
            row_id=-1,
            input_ids=torch.full((places,), base_model(model).config.image_token_id),
            position_ids=torch.arange(places).expand(3, -1),
            pixel_values=torch.ones(int(grids[0, 0]), *style.tile_size),  # Idefics3 takes zeros for padding
            image_grid_thw=grids,
            text="",
        )
    merge, patch_dim = patch_sizes(model)
    return Prompt(
        row_id=-1,
        input_ids=torch.tensor([base_model(model).config.image_token_id]),
        position_ids=torch.zeros(3, 1, dtype=torch.int64),
        pixel_values=torch.zeros(merge**2, patch_dim),
        image_grid_thw=torch.tensor([[1, merge, merge]]),
        text="",
        image_digests=(b"dummy image",),
    )
