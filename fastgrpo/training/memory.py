"""A step's memory on a GPU: whether it fits without computing layers twice, and what the sampler must leave free."""

from typing import Any

import torch
from fastgrpo_profiling.memory_estimate import StepSetting, step_bytes
from fastgrpo_profiling.roofline import ModelShape
from torch import nn
from transformers.utils import logging

from fastgrpo.settings.run_config import RunConfig

logger = logging.get_logger(__name__)

USABLE = 0.94
"""Of a GPU's memory, what an estimate may fill: it leaves out what allocators lose between tensors."""
DEFAULT_PROMPT = 1024
"""Tokens of a prompt where no setting bounds it."""
LOGPROB_BYTES = 4 << 30
"""Of the head's scratch where the run leaves it to what is free."""


def needs_checkpointing(model: Any, config: RunConfig, memory: float | None = None) -> bool:
    """Whether a step without checkpointing would not fit the GPU; says so in the log, with the estimate.

    On a CPU nothing is checkpointed: memory is seldom what is short there. A model whose sizes are not known, or which
    is not trained under half-precision autocast, is checkpointed on a GPU.

    Args:
        memory: bytes of the GPU; None: the run's own, 0 without one.
    """
    if memory is None:
        memory = torch.cuda.get_device_properties(config.device).total_memory if config.device.type == "cuda" else 0
    if not memory:
        return False
    shape = ModelShape.known(model.config)
    if shape is None or not (config.bf16 or config.fp16):
        logger.info("gradient_checkpointing=auto: on, since the memory of such a model is not known beforehand.")
        return True
    wanted, room = sum(step_bytes(shape, step_setting(model, config)).values()), USABLE * memory
    answer = "on" if wanted > room else "off"
    # TRL's default is on: who comes from there should know.
    (logger.info if wanted > room else logger.warning)(
        f"gradient_checkpointing=auto: {answer}; without it a step takes {wanted / 1e9:.0f} GB of {room / 1e9:.0f}."
    )
    return wanted > room


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
