"""The trainer that the flags describe: its model, adapters, data and rewards."""

import os
import sys
from dataclasses import fields

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from fastgrpo.cli.arguments import ScriptArguments, changed
from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.model.adapters import adapter_base
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.scoring.rewards import resolve_reward_functions
from fastgrpo.training.trainer import GRPOTrainer


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
    reward_functions = resolve_reward_functions(script.reward_funcs)  # a slip is told before a model is loaded
    adapters = lora_config(script)
    model = load_model(config, script)
    if adapters is not None:
        _require_modules(model, script)
    return trainer_class(
        model=model,
        reward_funcs=reward_functions,
        args=config,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=load_processing(
            script.model_name_or_path, script.min_pixels, script.max_pixels, config.trust_remote_code
        ),
        peft_config=adapters,
    )


def load_model(config: GRPOConfig, script: ScriptArguments) -> PreTrainedModel:
    """The policy, with what the flags freeze frozen."""
    return load_policy(
        script.model_name_or_path,
        dtype=script.dtype,
        attn_implementation=script.attn_implementation,
        freeze_vision=script.freeze_vision,
        freeze_llm=script.freeze_llm,
        trust_remote_code=config.trust_remote_code,
        model_init_kwargs=config.model_kwargs,
    )


def lora_config(script: ScriptArguments) -> LoraConfig | None:
    """The adapters to add and train, if any; a folder that holds some already gets no others.

    Raises:
        ValueError: a setting of new adapters, but the model has its own.
    """
    if adapter_base(script.model_name_or_path) is not None:
        own = [field.name for field in fields(script) if field.name.startswith("lora_")] + ["use_rslora"]
        if given := changed(script, own):
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
        modules_to_save=script.lora_modules_to_save,
        use_rslora=script.use_rslora,
        task_type="CAUSAL_LM",
    )


def load_training_rows(script: ScriptArguments, seed: int) -> RowDataset:
    """The rows to train on."""
    return load_rows(
        script.dataset_name,
        split=script.dataset_train_split,
        config_name=script.dataset_config,
        max_samples=script.max_samples,
        seed=seed,
        single_image_only=script.single_image_only,
    )


def load_held_out(script: ScriptArguments, seed: int) -> RowDataset | None:
    """The rows to score before and after training, if any are named."""
    if script.eval_dataset_name is None:
        return None
    return load_rows(script.eval_dataset_name, split=script.eval_split, max_samples=script.eval_max_samples, seed=seed)


def _require_modules(model: PreTrainedModel, script: ScriptArguments) -> None:
    """Checks that the model has every module that is named: peft ignores unknown names as long as it finds one."""
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for flag in ("lora_target_modules", "lora_modules_to_save"):
        for name in getattr(script, flag) or ():
            if name != "all-linear" and name.rsplit(".", 1)[-1] not in known:
                raise ValueError(
                    f"{flag}: {type(model).__name__} has no module {name!r}{did_you_mean(name, known)}; its linear "
                    f"layers are {', '.join(sorted(_linear_layers(model)))}"
                )


def _linear_layers(model: PreTrainedModel) -> set[str]:
    names = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name in names if not name.isdecimal()}
