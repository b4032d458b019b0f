"""What users pass to the trainer, in its many forms, into what the trainer works with: model, engine and updater."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fastgrpo.config import GRPOConfig
from fastgrpo.data.examples import ExampleBuilder, ExampleCollator
from fastgrpo.data.prompts import PromptBuilder, PromptCollator
from fastgrpo.data.row_dataset import RowDataset, as_rows
from fastgrpo.data.row_order import RolloutLoader, RolloutSampler
from fastgrpo.model.families import unwrap
from fastgrpo.model.float32_head import require_plain_head
from fastgrpo.model.load import Processing, load_config, load_policy, load_processing, processing_from
from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.plain.supervised import PlainSupervisedUpdater
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.run_config import RunConfig
from fastgrpo.sampler.decoder import unsupported
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.scoring.rewards import RewardFunction, reads_golds
from fastgrpo.sft_config import SFTConfig
from fastgrpo.training.deepspeed_settings import take_whole_steps
from fastgrpo.training.memory import needs_checkpointing
from fastgrpo.types import Engine, RowError, SamplingParams, Updater
from fastgrpo.update.objective import loss_params, scaling
from fastgrpo.update.supervised import SupervisedUpdater
from fastgrpo.update.updater import PackedUpdater

logger = logging.getLogger(__name__)


def sampling_params(config: GRPOConfig) -> SamplingParams:
    """How a run draws its completions; `generation_kwargs` go before the settings of the same name."""
    given = {
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
    } | config.generation_settings
    return SamplingParams(**{**given, "min_p": given["min_p"] or 0.0}, seed=config.seed)


def tell_of_lost_balance(config: GRPOConfig, model: PreTrainedModel) -> None:
    """Warns where TRL would add a mixture of experts' load-balancing loss."""
    declared = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
    if config.router_aux_loss_coef is None and declared:
        logger.warning(
            "The model declares router_aux_loss_coef=%s: no load-balancing loss is added here, as TRL does. Set "
            "router_aux_loss_coef to 0 to read this no more.",
            declared,
        )


def settle(config: RunConfig, model: PreTrainedModel) -> None:
    """Decides, in place, what the settings leave open until the model and the machine are known."""
    take_whole_steps(config)
    if config.decides_checkpointing:
        needed = needs_checkpointing(model, config)
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # transformers' older and newer name
            setattr(config, name, needed)
    if config.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible, one is used; `accelerate launch -m fastgrpo train` uses all.", config.n_gpu
        )
        config._n_gpu = 1  # nn.DataParallel would cut packed pictures and M-RoPE positions in pieces
    if config.ddp_find_unused_parameters is None:
        config.ddp_find_unused_parameters = False  # the updaters run the vision tower on ranks without pictures too


def resolve_processing(model: Any, given: Any, config: RunConfig) -> Processing:
    """Tokenizer and image processor, from a processor, a tokenizer, or the model's own folder.

    Raises:
        ValueError: there is none, or it is not the model's.
    """
    if given is not None:
        is_named = isinstance(model, str)
        return processing_from(given, load_config(model, config.trust_remote_code) if is_named else model.config)
    path = model if isinstance(model, str) else model.config._name_or_path
    if not path:
        raise ValueError(
            f"processing_class is missing, and this {type(model).__name__} was not loaded from anywhere: pass its "
            "processor or tokenizer."
        )
    return load_processing(path, trust_remote_code=config.trust_remote_code)


def resolve_model(model: Any, config: RunConfig, peft_config: Any) -> PreTrainedModel:
    """The policy: loaded when named, wrapped in adapters when asked, dropout off when asked."""
    if isinstance(model, str):
        model = load_policy(model, trust_remote_code=config.trust_remote_code, model_init_kwargs=config.model_kwargs)
    elif config.needs_reference and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"beta={config.beta} needs a frozen copy, but the model is partitioned by ZeRO-3. Pass its name or folder "
            "as model, or load it before GRPOConfig(deepspeed=…) is made."
        )
    if peft_config is not None and hasattr(model, "disable_adapter"):
        raise ValueError("peft_config: the model has adapters already, which train further. Leave it out.")
    if peft_config is not None:
        set_seed(config.seed)  # for the adapters' first values, as transformers' Trainer does a little later
        model = get_peft_model(model, peft_config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"nothing to train: every parameter of {type(model).__name__} is frozen. Unfreeze some, load adapters with "
            "is_trainable=True, or train new ones (peft_config)."
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


def resolve_rows(dataset: Any, name: str, config: GRPOConfig, reward_functions: Sequence[RewardFunction]) -> RowDataset:
    """What a user passed as `name`; where rewards read gold answers, rows without a usable one will be skipped."""
    rows = as_rows(dataset, config.seed, name=name)
    return rows.with_checked_golds() if reads_golds(reward_functions) else rows


def require_a_good_row(rows: RowDataset, builder: PromptBuilder | ExampleBuilder) -> None:
    """Looks for the first row that can be built, so that a data set without any fails before training."""
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


def build_prompt_builder(processing: Processing, config: GRPOConfig) -> PromptBuilder:
    """What turns rows into prompts."""
    return PromptBuilder(
        processing.tokenizer,
        processing.image_processor,
        family=processing.family,
        mode=config.prompt_mode,
        template=config.prompt_template,
        max_prompt_length=config.max_prompt_length,
        chat_template_kwargs=config.template_kwargs,
    )


def build_loader(
    rows: RowDataset, collate: PromptCollator | ExampleCollator, config: RunConfig, rank: int, ranks: int
) -> RolloutLoader:
    """A rank's prompts, in the run's order of rows; the micro-batches are those that transformers counts.

    Raises:
        ValueError: the data set is smaller than one rollout.
    """
    plan = config.batch_plan
    sampler = RolloutSampler(
        len(rows),
        plan.prompts_per_rollout,
        repeats=plan.updates_per_rollout,
        turns=plan.accumulation,
        shuffle=config.shuffle_dataset,
        seed=config.seed if config.data_seed is None else config.data_seed,
        rank=rank,
        world_size=ranks,
    )
    return RolloutLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.dataloader_num_workers or 0,
        prefetch_factor=config.dataloader_prefetch_factor,
        persistent_workers=config.dataloader_persistent_workers,
        multiprocessing_context=config.dataloader_multiprocessing_context,
        in_order=config.dataloader_in_order,
    )


def build_vision_cache(model: Any, config: RunConfig) -> VisionCache | None:
    """What engine and updater share where the vision tower is frozen; None for text models and where it is off."""
    if config.engine != "fast" or config.vision_cache_bytes == 0 or unsupported(model) is not None:
        return None
    tower = vision_tower(model)
    return None if tower is None else VisionCache(tower, config.vision_cache_bytes)


def build_engine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    accelerator: Accelerator,
    vision_cache: VisionCache | None = None,
    memory_to_come: Callable[[], int] = lambda: 0,
) -> Engine:
    """The paged sampler; HF `generate` for `engine="plain"`, and with a warning for models it does not know."""
    reason = unsupported(model)
    if config.engine == "fast" and reason is None:
        return SamplerEngine(
            model,
            tokenizer,
            options=SamplerOptions(max_rows=config.sampler_max_rows, max_cache_tokens=config.sampler_max_cache_tokens),
            device=accelerator.device,  # the model itself may be moved there later
            dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
            autocast=accelerator.autocast,
            vision_cache=vision_cache,
            memory_to_come=memory_to_come,
        )
    if config.engine == "fast":
        logger.warning(
            "Rollouts fall back to transformers' generate: the sampler cannot run this model, %s. Lost are speed (each "
            "prompt is processed once per completion) and completions that depend on their own seed alone.",
            reason,
        )
    plugin, plan = accelerator.state.deepspeed_plugin, config.batch_plan
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("deepspeed: ZeRO stage 3 leaves no rank whole weights for transformers' generate. Use 2.")
    return PlainEngine(
        model,
        tokenizer,
        rank=accelerator.process_index,
        max_batch=max(plan.completions_per_micro_batch, config.per_device_eval_batch_size * plan.num_generations),
        autocast=accelerator.autocast,
    )


def build_updater(
    model: Any,
    reference_model: PreTrainedModel | None,
    config: GRPOConfig,
    accelerator: Accelerator,
    vision_cache: VisionCache | None = None,
) -> Updater:
    """The packed update; padded batches for `engine="plain"`, and with a warning for models it cannot pack."""
    shared: dict[str, Any] = {
        "temperature": config.temperature,
        "reference_model": reference_model,
        "accelerator": accelerator,
        "scaling": scaling(config),
        "float32_head": config.cast_lm_head_to_fp32,
    }
    if config.cast_lm_head_to_fp32:
        require_plain_head(unwrap(model))
    if config.engine == "fast":
        try:
            return PackedUpdater(
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
    return PlainUpdater(
        model, loss_params(config), micro_batch_size=config.batch_plan.completions_per_micro_batch, **shared
    )


def build_supervised_updater(
    model: Any, config: SFTConfig, accelerator: Accelerator, vision_cache: VisionCache | None = None
) -> SupervisedUpdater | PlainSupervisedUpdater:
    """The packed update; an example at a time for `engine="plain"`, and with a warning for models it cannot pack."""
    if config.engine == "fast":
        try:
            return SupervisedUpdater(
                model,
                token_budget=config.token_budget,
                accelerator=accelerator,
                attn_backend=config.attn_backend,
                logprob_bytes=config.logprob_bytes,
                vision_cache=vision_cache,
            )
        except ValueError as error:
            logger.warning("The packed update cannot train this model: %s Rows go one at a time, slower.", error)
    return PlainSupervisedUpdater(model, accelerator=accelerator)
