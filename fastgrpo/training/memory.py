"""A step's memory on a GPU: whether it fits without computing layers twice, and what the sampler must leave free."""

from dataclasses import replace
from typing import Any

import torch
from fastgrpo_profiling.memory_estimate import TOKEN_BUDGETS, StepSetting, budget_without_checkpointing, step_bytes
from fastgrpo_profiling.roofline import ModelShape
from torch import nn
from transformers.utils import logging

from fastgrpo.settings.run_config import RunConfig

logger = logging.get_logger(__name__)

DEFAULT_PROMPT = 1024
"""Tokens of a prompt where no setting bounds it."""
LOGPROB_BYTES = 4 << 30
"""Of the head's scratch where the run leaves it to what is free."""


def settle_memory(model: Any, config: RunConfig, memory: float | None = None) -> tuple[bool, int]:
    """Whether to checkpoint, and tokens of a micro-batch, where the settings leave them open.

    With gradient_checkpointing=auto a step is checkpointed that would not fit the GPU otherwise, not even in smaller
    micro-batches; the log says so, with the estimate. On a CPU nothing is checkpointed: memory is seldom what is short
    there. On a GPU a model is checkpointed whose sizes are not known, or that is not trained under half-precision
    autocast.

    Args:
        memory: bytes of the GPU; None: the run's own, 0 without one.
    """
    budgets = TOKEN_BUDGETS if config.token_budget is None else (config.token_budget,)
    if memory is None:
        memory = torch.cuda.get_device_properties(config.device).total_memory if config.device.type == "cuda" else 0
    if not config.decides_checkpointing:
        return bool(config.gradient_checkpointing), budgets[0]
    if not memory:
        return False, budgets[0]
    shape = ModelShape.known(model.config)
    if shape is None or not (config.bf16 or config.fp16):
        logger.info("gradient_checkpointing=auto: on, since the memory of such a model is not known beforehand.")
        return True, budgets[0]
    setting = step_setting(model, config)
    budget = budget_without_checkpointing(shape, setting, memory, budgets)
    wanted = sum(step_bytes(shape, replace(setting, token_budget=budget or budgets[-1])).values())
    # TRL's default is on: who comes from there should know.
    (logger.info if budget is None else logger.warning)(
        f"gradient_checkpointing=auto: {'on' if budget is None else 'off'}; without it a step takes "
        f"{wanted / 1e9:.0f} GB of {memory / 1e9:.0f}, in micro-batches of {budget or budgets[-1]} tokens."
    )
    return budget is None, budget or budgets[0]


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
        token_budget=config.token_budget or TOKEN_BUDGETS[0],
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
