"""What users pass to the trainer, in its many forms, into what the trainer works with: model, engine and updater."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from fastgrpo.config import GRPOConfig
from fastgrpo.model.families import is_multimodal, learns_prompt, unwrap
from fastgrpo.model.float32_head import require_plain_head
from fastgrpo.model.load import Processing, load_config, load_policy, load_processing, processing_from
from fastgrpo.model.quantized import quantized_loading
from fastgrpo.model.reward_model import model_name
from fastgrpo.model.router_loss import router_coefficient
from fastgrpo.model.vision import new_vision_cache
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.plain.hf_generation import has_own_generate
from fastgrpo.plain.supervised import PlainSupervisedUpdater
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.sampler.choice import unsupported
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.settings.sft_config import SFTConfig
from fastgrpo.training.deepspeed_settings import take_whole_steps
from fastgrpo.training.memory import is_checkpointed
from fastgrpo.types import Engine, SamplingParams, Updater
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


def settle(config: RunConfig, model: PreTrainedModel) -> None:
    """Decides, in place, what the settings leave open until the model and the machine are known."""
    take_whole_steps(config)
    checkpointing = is_checkpointed(model, config)
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # transformers' older and newer name
        if config.decides_checkpointing:
            setattr(config, name, checkpointing)
    if config.gradient_checkpointing and _has_prefix(model):
        logger.warning("gradient_checkpointing is off: recomputed layers would not see the learnt prefix.")
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            setattr(config, name, False)
    if config.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible, one is used; `accelerate launch -m fastgrpo train` uses all.", config.n_gpu
        )
        config._n_gpu = 1  # nn.DataParallel would cut packed pictures and M-RoPE positions in pieces
    if config.ddp_find_unused_parameters is None:
        config.ddp_find_unused_parameters = False  # the updaters run the vision tower on ranks without pictures too


def _has_prefix(model: Any) -> bool:
    return learns_prompt(model) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def resolve_processing(model: Any, given: Any, config: RunConfig) -> Processing:
    """Tokenizer and image processor, from a processor, a tokenizer, or the model's own folder.

    Raises:
        ValueError: there is none, or it is not the model's.
    """
    revision = config.model_kwargs.get("revision")
    if given is not None:
        if isinstance(model, str):
            return processing_from(given, load_config(model, config.trust_remote_code, revision))
        return processing_from(given, model.config)
    path = model if isinstance(model, str) else model.config._name_or_path
    if not path:
        raise ValueError(
            f"processing_class is missing, and this {type(model).__name__} was not loaded from anywhere: pass its "
            "processor or tokenizer."
        )
    return load_processing(path, trust_remote_code=config.trust_remote_code, revision=revision)


def default_output_dir(model: Any) -> str:
    """Where a run without settings writes: MODEL-GRPO, by the last part of the model's name."""
    return f"{model.rstrip('/').rpartition('/')[2] if isinstance(model, str) else model_name(model)}-GRPO"


def resolve_processing_class(given: Any, processing: Processing) -> Any:
    """What callbacks and scripts see as the trainer's: the one passed, or a text model's tokenizer."""
    if isinstance(given, PreTrainedTokenizerBase | ProcessorMixin):
        return given
    return processing.tokenizer if processing.image_processor is None else processing


def resolve_model(model: Any, config: RunConfig, peft_config: Any, quantization_config: Any = None) -> PreTrainedModel:
    """The policy: loaded when named, wrapped in adapters when asked, dropout off when asked."""
    if isinstance(model, str):
        arguments = config.model_kwargs | quantized_loading(quantization_config, config)
        model = load_policy(model, trust_remote_code=config.trust_remote_code, model_init_kwargs=arguments)
    elif quantization_config is not None:
        raise ValueError("quantization_config: the model is loaded already. Pass its name, or load it quantized.")
    elif config.needs_reference and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"beta={config.beta} needs a frozen copy, but the model is partitioned by ZeRO-3. Pass its name or folder "
            "as model, or load it before GRPOConfig(deepspeed=…) is made."
        )
    if peft_config is not None and hasattr(model, "disable_adapter"):
        raise ValueError("peft_config: the model has adapters already, which train further. Leave it out.")
    if getattr(peft_config, "is_prompt_learning", False) and is_multimodal(model):
        raise ValueError(
            f"peft_config: {type(peft_config).__name__} puts learnt vectors before the input, which moves the "
            f"positions of {type(model).__name__}'s pictures. Use LoRA, or another adapter on its layers."
        )
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


def resolve_reward_weights(config: GRPOConfig, count: int, owned: int = 0) -> Tensor:
    """[count] float32, one weight per reward function; 1 for those that environments own, the last of them."""
    count -= owned
    weights = config.reward_weights or [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"reward_weights={weights}: {len(weights)} values for {count} reward functions, give one each."
        )
    return torch.tensor([*weights, *[1.0] * owned], dtype=torch.float32)


def build_vision_cache(model: Any, config: RunConfig) -> VisionCache | None:
    """What engine and updater share where the vision tower is frozen; None without such a tower and where it is off."""
    if config.engine != "fast" or config.vision_cache_bytes == 0:
        return None
    return new_vision_cache(model, config.vision_cache_bytes)


def build_engine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    accelerator: Accelerator,
    vision_cache: VisionCache | None = None,
    memory_to_come: Callable[[], int] = lambda: 0,
) -> Engine:
    """The paged sampler; HF `generate` for `engine="plain"`, and with a warning for models it does not know."""
    reason = "it draws by a `generate` of its own" if has_own_generate(model) else unsupported(model)
    if config.engine == "fast" and reason is None:
        return SamplerEngine(
            model,
            tokenizer,
            options=SamplerOptions(
                max_rows=config.sampler_max_rows,
                max_cache_tokens=config.sampler_max_cache_tokens,
                speculate=config.guesses,
            ),
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
    if config.guesses:
        logger.warning("speculate=%s is ignored: transformers' generate guesses nothing.", config.speculate)
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
        "router_coefficient": router_coefficient(model, config.router_aux_loss_coef),
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
