"""The trainer that the flags describe: its model, adapters, data and rewards."""

import os
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from fastgrpo.cli.run_arguments import RunArguments, ScriptArguments, SFTArguments, adapter_flags, changed
from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.model.adapters import adapter_base
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.model.quantized import quantized_loading
from fastgrpo.scoring.rewards import resolve_reward_functions
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.settings.script_arguments import ModelConfig, get_quantization_config
from fastgrpo.settings.sft_config import SFTConfig
from fastgrpo.training.sft import SFTTrainer
from fastgrpo.training.trainer import GRPOTrainer

BITS = (
    *("dtype", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
    "bnb_4bit_quant_storage",
)
"""Flags of a quantized base."""


def build_trainer(
    config: GRPOConfig,
    script: ScriptArguments,
    rows: RowDataset,
    eval_rows: RowDataset | None = None,
    trainer_class: type[GRPOTrainer] = GRPOTrainer,
) -> GRPOTrainer:
    """A trainer on the flags' model and rewards, to train on `rows`.

    Raises:
        ValueError: a model, a setting or a row that cannot work.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a user's rewards: unlike a script, a command does not look there
    reward_functions = resolve_reward_functions(script.rewards)  # a slip is told before a model is loaded
    return trainer_class(
        reward_funcs=reward_functions, args=config, train_dataset=rows, eval_dataset=eval_rows, **_model(config, script)
    )


def build_sft_trainer(
    config: SFTConfig, script: SFTArguments, rows: RowDataset, eval_rows: RowDataset | None = None
) -> SFTTrainer:
    """A trainer on the flags' model, to imitate the answers of `rows`.

    Raises:
        ValueError: a model, a setting or a row that cannot work.
    """
    return SFTTrainer(args=config, train_dataset=rows, eval_dataset=eval_rows, **_model(config, script))


def _model(config: RunConfig, script: RunArguments) -> dict[str, Any]:
    """The arguments of a trainer that say what is trained."""
    adapters = lora_config(script)
    model = load_model(config, script)
    if adapters is not None:
        _require_modules(model, script)
    processing = load_processing(
        script.model_name_or_path,
        script.min_pixels,
        script.max_pixels,
        config.trust_remote_code,
        _model_kwargs(config, script).get("revision"),
    )
    return {"model": model, "processing_class": processing, "peft_config": adapters}


def load_model(config: RunConfig, script: RunArguments) -> PreTrainedModel:
    """The policy, with what the flags freeze frozen."""
    return load_policy(
        script.model_name_or_path,
        dtype=script.dtype,
        attn_implementation=script.attn_implementation,
        freeze_vision=script.freeze_vision,
        freeze_llm=script.freeze_llm,
        trust_remote_code=config.trust_remote_code,
        model_init_kwargs=_model_kwargs(config, script),
    )


def _model_kwargs(config: RunConfig, script: RunArguments) -> dict[str, Any]:
    """`model_init_kwargs`, and what the flags add to them."""
    bits = ModelConfig(**{name: getattr(script, name) for name in BITS})
    arguments = config.model_kwargs | quantized_loading(get_quantization_config(bits), config)
    if script.model_revision != "main":
        if Path(script.model_name_or_path).exists():
            raise ValueError(
                f"model_revision={script.model_revision!r}: {script.model_name_or_path} is a folder, which has none."
            )
        arguments["revision"] = script.model_revision
    return arguments


def lora_config(script: RunArguments) -> LoraConfig | None:
    """The adapters to add and train, if any; a folder that holds some already gets no others.

    Raises:
        ValueError: a setting of new adapters, but the model has its own.
    """
    if adapter_base(script.model_name_or_path) is not None:
        if given := changed(script, adapter_flags(script)):
            raise ValueError(
                f"{', '.join(given)}: {script.model_name_or_path} holds adapters with settings of their own, which "
                "train further. Leave these flags out, or name the base as model_name_or_path."
            )
        return None
    if not script.use_peft:
        return None
    targets = script.lora_target_modules
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=script.lora_target_parameters,
        modules_to_save=script.lora_modules_to_save,
        use_rslora=script.use_rslora,
        use_dora=script.use_dora,
        task_type=script.lora_task_type,
    )


def load_training_rows(script: RunArguments, seed: int) -> RowDataset:
    """The rows to train on."""
    return load_rows(
        script.dataset_name,
        split=script.dataset_train_split,
        config_name=script.dataset_config,
        max_samples=script.max_samples,
        seed=seed,
        single_image_only=script.single_image_only,
        picture_folders=script.picture_folders or (),
    )


def load_held_out(script: RunArguments, seed: int) -> RowDataset | None:
    """The rows to score before and after training, if any are named."""
    if script.eval_dataset_name is None:
        return None
    try:
        return load_rows(
            script.eval_dataset_name,
            split=script.eval_split,
            max_samples=script.eval_max_samples,
            seed=seed,
            picture_folders=script.picture_folders or (),
        )
    except ValueError as error:
        raise ValueError(f"eval_dataset_name: {error}") from error


def load_test_split(script: RunArguments, seed: int) -> RowDataset:
    """The test split of the training data; a ValueError where it has none."""
    return load_rows(
        script.dataset_name,
        split=script.dataset_test_split,
        config_name=script.dataset_config,
        seed=seed,
        picture_folders=script.picture_folders or (),
    )


def _require_modules(model: PreTrainedModel, script: RunArguments) -> None:
    """Checks that the model has every module and parameter that is named: peft ignores others as long as it finds
    one module."""
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for flag in ("lora_target_modules", "lora_modules_to_save"):
        for name in getattr(script, flag) or ():
            if name != "all-linear" and name.rsplit(".", 1)[-1] not in known:
                raise ValueError(
                    f"{flag}: {type(model).__name__} has no module {name!r}{did_you_mean(name, known)}; its linear "
                    f"layers are {', '.join(sorted(_linear_layers(model)))}"
                )
    for name in script.lora_target_parameters or ():
        if not any(f".{one}".endswith(f".{name}") for one, _ in model.named_parameters()):
            raise ValueError(f"lora_target_parameters: {type(model).__name__} has no parameter {name!r}: leave it out")


def _linear_layers(model: PreTrainedModel) -> set[str]:
    names = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name in names if not name.isdecimal()}
