"""Which engine and which policy a run gets: the fast ones, or plain HF and torch where asked for or needed."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastgrpo.config import GRPOConfig
from fastgrpo.model.decoder import unsupported
from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.objective import loss_params
from fastgrpo.policy import PackedPolicy
from fastgrpo.reference import ReferenceEngine, ReferencePolicy
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.types import Engine, Policy

logger = logging.getLogger(__name__)


def build_vision_cache(model: Any, config: GRPOConfig) -> VisionCache | None:
    """What engine and policy share where the vision tower is frozen; None for text models and where it is off."""
    if config.engine != "fast" or config.vision_cache_bytes == 0 or unsupported(model) is not None:
        return None
    tower = vision_tower(model)
    return None if tower is None else VisionCache(tower, config.vision_cache_bytes)


def build_engine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: GRPOConfig,
    accelerator: Accelerator,
    version: Callable[[], int],
    vision_cache: VisionCache | None = None,
) -> Engine:
    """The paged sampler; HF `generate` for `engine="reference"`, and with a warning for models it does not know.

    `version` tells the policy's version: the sampler refreshes its weights when that has changed.
    """
    reason = unsupported(model)
    if config.engine == "fast" and reason is None:
        return SamplerEngine(
            model,
            tokenizer,
            version=version,
            options=SamplerOptions(max_rows=config.sampler_max_rows, max_cache_tokens=config.sampler_max_cache_tokens),
            device=accelerator.device,  # the model itself may be moved there later
            dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
            autocast=accelerator.autocast,
            vision_cache=vision_cache,
        )
    if config.engine == "fast":
        logger.warning(
            "Rollouts fall back to transformers' generate: the sampler cannot run this model, %s. Lost are speed (each "
            "prompt is processed once per completion) and completions that depend on their own seed alone.",
            reason,
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("deepspeed: ZeRO stage 3 leaves no rank whole weights for transformers' generate. Use 2.")
    return ReferenceEngine(
        model,
        tokenizer,
        rank=accelerator.process_index,
        max_batch=max(config.completions_per_micro_batch, config.per_device_eval_batch_size * config.num_generations),
        autocast=accelerator.autocast,
    )


def build_policy(
    model: Any,
    reference_model: PreTrainedModel | None,
    config: GRPOConfig,
    accelerator: Accelerator,
    vision_cache: VisionCache | None = None,
) -> Policy:
    """The packed update; padded batches for `engine="reference"`, and with a warning for models it cannot pack."""
    shared: dict[str, Any] = {
        "temperature": config.temperature,
        "reference_model": reference_model,
        "accelerator": accelerator,
    }
    if config.engine == "fast":
        try:
            return PackedPolicy(
                model,
                loss_params(config),
                token_budget=config.token_budget,
                attn_backend=config.attn_backend,
                logprob_bytes=config.logprob_bytes,
                vision_cache=vision_cache,
                **shared,
            )
        except ValueError as error:
            logger.warning("The packed update cannot train this model: %s Padded batches are used, slower.", error)
    return ReferencePolicy(model, loss_params(config), micro_batch_size=config.completions_per_micro_batch, **shared)
