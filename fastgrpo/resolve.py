"""What users pass to the trainer, in its many forms, into what the trainer works with."""

import copy
import logging
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import RowDataset
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.model.load import Processing, load_policy, load_processing
from fastgrpo.types import RowError, SamplingParams

logger = logging.getLogger(__name__)


def sampling_params(config: GRPOConfig) -> SamplingParams:
    """How a run draws its completions."""
    return SamplingParams(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )


def one_step_per_batch(config: GRPOConfig) -> GRPOConfig:
    """The settings transformers sees: its batch is one optimizer step of ours, without accumulation."""
    args = copy.copy(config)
    args.per_device_train_batch_size = config.prompts_per_rollout
    args.gradient_accumulation_steps = 1
    settings = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
    if {"gradient_accumulation_steps", "train_batch_size"} <= settings.keys():  # else DeepSpeed's own are 1
        settings["train_batch_size"] //= settings["gradient_accumulation_steps"]
        settings["gradient_accumulation_steps"] = 1
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible, one is used; `accelerate launch -m fastgrpo train` uses all.", args.n_gpu)
        args._n_gpu = 1  # nn.DataParallel would cut packed pictures and M-RoPE positions in pieces
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # the policies run the vision tower on ranks without pictures too
    return args


def resolve_processing(model: Any, given: Any, config: GRPOConfig) -> Processing:
    """Tokenizer and image processor, from a processor, a tokenizer, or the model's own folder."""
    if isinstance(given, Processing):
        return given
    if given is None:
        path = model if isinstance(model, str) else model.config._name_or_path
        return load_processing(path, trust_remote_code=config.trust_remote_code)
    return Processing(getattr(given, "tokenizer", given), getattr(given, "image_processor", None))


def resolve_model(model: Any, config: GRPOConfig, peft_config: Any) -> PreTrainedModel:
    """The policy: loaded when named, wrapped in adapters when asked, dropout off when asked."""
    if isinstance(model, str):
        model = load_policy(model, trust_remote_code=config.trust_remote_code, model_init_kwargs=config.model_kwargs)
    elif config.beta > 0 and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"beta={config.beta} needs a frozen copy, but the model is partitioned by ZeRO-3. Pass its name or folder "
            "as model, or load it before GRPOConfig(deepspeed=…) is made."
        )
    if peft_config is not None:
        set_seed(config.seed)  # for the adapters' first values, as transformers' Trainer does a little later
        model = get_peft_model(model, peft_config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"nothing to train: every parameter of {type(model).__name__} is frozen. Unfreeze some, or train adapters "
            "(peft_config)."
        )
    if config.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def resolve_reward_weights(config: GRPOConfig, count: int) -> Tensor:
    """[count] float32, one weight per reward function."""
    weights = config.reward_weights or [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"reward_weights={weights}: {len(weights)} values for {count} reward functions, give one each."
        )
    return torch.tensor(weights, dtype=torch.float32)


def require_a_good_row(rows: RowDataset, builder: PromptBuilder) -> None:
    """Looks for the first row that becomes a prompt, so that a data set without any fails before training."""
    first_reason = ""
    for index in range(len(rows)):
        row_id, raw = rows[index]
        try:
            builder.build(rows.convert(row_id, raw))
        except RowError as error:
            first_reason = first_reason or f"row {row_id}: {error}"
        else:
            return
    raise ValueError(f"none of the {len(rows)} rows can be used; {first_reason}")
