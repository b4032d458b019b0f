"""A step's memory on a GPU: whether it fits without computing layers twice, and what the sampler must leave free."""

from typing import Any

import torch
from fastgrpo_profiling.memory_estimate import StepSetting, fits_unchecked, step_bytes
from fastgrpo_profiling.roofline import ModelShape
from torch import nn
from transformers.utils import logging

from fastgrpo.settings.run_config import RunConfig

logger = logging.get_logger(__name__)

DEFAULT_PROMPT = 1024
"""Tokens of a prompt where no setting bounds it."""
LOGPROB_BYTES = 4 << 30
"""Of the head's scratch where the run leaves it to what is free."""


def is_checkpointed(model: Any, config: RunConfig, memory: float | None = None) -> bool:
    """Whether a step's layers are computed twice, where gradient_checkpointing=auto leaves it open.

    On a GPU, those of a step that would not fit otherwise; the log says so, with the estimate. A model is checkpointed,
    too, whose sizes are not known, or that is not trained under half-precision autocast. On a CPU nothing is: memory is
    seldom what is short there.

    Args:
        memory: bytes of the GPU; None: the run's own, 0 without one.
    """
    if memory is None:
        memory = torch.cuda.get_device_properties(config.device).total_memory if config.device.type == "cuda" else 0
    if not config.decides_checkpointing:
        return bool(config.gradient_checkpointing)
    if not memory:
        return False
    shape = ModelShape.known(model.config)
    if shape is None or not (config.bf16 or config.fp16):
        logger.info("gradient_checkpointing=auto: on, since the memory of such a model is not known beforehand.")
        return True
    setting = step_setting(model, config)
    fits, wanted = fits_unchecked(shape, setting, memory), sum(step_bytes(shape, setting).values())
    # TRL's default is on: who comes from there should know.
    (logger.warning if fits else logger.info)(
        f"gradient_checkpointing=auto: {'off' if fits else 'on'}; without it a step takes {wanted / 1e9:.0f} GB of "
        f"{memory / 1e9:.0f}."
    )
    return not fits


def step_setting(model: Any, config: RunConfig) -> StepSetting:
    """A run's bounds, not checkpointed: every prompt and completion as long as it may be, all of a prompt pictures."""
    plan, plugin = config.batch_plan, config.deepspeed_plugin
    longest_prompt, completion_tokens = config.longest
    prompt_tokens = longest_prompt or DEFAULT_PROMPT
    vision = getattr(model.config, "vision_config", None)
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return StepSetting(
        prompts=plan.prompts_per_rollout,
        group=plan.num_generations,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        picture_patches=0 if vision is None else prompt_tokens * getattr(vision, "spatial_merge_size", 1) ** 2,
        token_budget=config.token_budget,
        logprob_bytes=float(config.logprob_bytes or LOGPROB_BYTES),
        checkpointing=False,
        has_reference=config.needs_reference and not hasattr(model, "disable_adapter"),
        half_reference=not (config.needs_reference and config.sync_ref_model),
        trained_share=trained / sum(parameter.numel() for parameter in parameters),
        world_size=config.world_size,
        zero_stage=0 if plugin is None else plugin.zero_stage,
    )


def memory_to_come(model: nn.Module, optimizer: Any) -> int:
    """Bytes that an update still allocates: gradients, and Adam's two moments, in float32, where they are not there.

    Args:
        optimizer: None before the first step, which makes the moments.
    """
    moments = {} if optimizer is None else optimizer.state
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(4 * parameter.numel() for parameter in trained if parameter.grad is None)
    return gradients + sum(8 * parameter.numel() for parameter in trained if not moments.get(parameter))
