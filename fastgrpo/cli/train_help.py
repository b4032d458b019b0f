"""`fastgrpo train|sft --help`: our flags and what a run is usually given, in groups; `--help_all`: the rest too."""

import shutil
import textwrap
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from transformers import TrainingArguments

from fastgrpo.cli.run_arguments import MAPPED, ScriptArguments, SFTArguments
from fastgrpo.config import GRPOConfig
from fastgrpo.settings.sft_config import SFTConfig
from fastgrpo.settings.trl_fields import FOREIGN

HELP_WIDTH = 120


@dataclass(frozen=True)
class Page:
    """What a command's help is made of."""

    command: str
    records: tuple[type, ...]
    """The dataclasses behind its flags."""


TRAIN = Page("train", (ScriptArguments, GRPOConfig))
SFT = Page("sft", (SFTArguments, SFTConfig))

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "freeze_vision", "freeze_llm"),
        *("trust_remote_code", "model_init_kwargs", "disable_dropout"),
    ),
    "Adapters": (
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
        *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora", "load_in_8bit", "load_in_4bit"),
        *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    ),
    "Data and prompts": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "max_samples"),
        *("single_image_only", "picture_folders", "train_on_prompt", "max_length"),
        *("min_pixels", "max_pixels", "prompt_mode", "prompt_template", "chat_template_kwargs", "max_prompt_length"),
        "shuffle_dataset",
    ),
    "Rewards": (
        "reward_funcs",
        "reward_model_name_or_path",
        "reward_weights",
        "scale_rewards",
        "reward_timeout",
        "multi_objective_aggregation",
    ),
    "Batches and steps": (
        *("per_device_train_batch_size", "batch_unit", "gradient_accumulation_steps", "generation_batch_size"),
        *("steps_per_generation", "num_iterations", "num_train_epochs", "max_steps", "learning_rate"),
        *("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
        *("on_nonfinite", "seed"),
    ),
    "Rollouts": (
        *("num_generations", "num_generations_eval", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "generation_kwargs"),
    ),
    "Objective": (
        *("loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
        *("use_bias_correction_kl", "mask_truncated_completions", "sapo_temperature_neg", "sapo_temperature_pos"),
        *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "off_policy_mask_threshold"),
        *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta"),
        *("entropy_coef_min", "entropy_coef_max", "use_vllm"),
        *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_on_cpu"),
    ),
    "Machine": (
        *("bf16", "fp16", "gradient_checkpointing", "deepspeed", "use_liger_kernel", "use_cpu", "engine"),
        *("token_budget", "attn_backend", "logprob_bytes", "vision_cache_bytes", "sampler_max_rows"),
        *("sampler_max_cache_tokens", "speculate"),
    ),
    "Scores before and after training": (
        *("eval_dataset_name", "eval_split", "eval_max_samples", "eval_max_new_tokens", "eval_pass_at_k"),
        *("eval_shuffles", "per_device_eval_batch_size"),
    ),
    "Output": (
        *("output_dir", "run_name", "report_to", "logging_steps", "log_completions", "log_multimodal"),
        *("num_completions_to_print", "save_steps", "save_total_limit", "save_only_model", "resume_from_checkpoint"),
        *("resume_changed", "profile_steps"),
    ),
}
"""Title → flags, of which a command has most. A flag of ours that no group names comes under `FURTHER`."""
FURTHER = "Further"
SAID_BETTER = {
    "gradient_accumulation_steps": "Micro-batches of an optimizer step.",
    "max_steps": "Optimizer steps; overrides num_train_epochs where positive.",
    "output_dir": "Folder of the run: logs, checkpoints, scores, report. trainer_output if unset.",
    "per_device_train_batch_size": "Completions (or prompts, see batch_unit; or rows) of a rank's micro-batch.",
    "per_device_eval_batch_size": "Questions that are scored at a time.",
    "use_cpu": "Train on the CPU, even where there is a GPU.",
}
"""Help of flags that mean something of their own here, or that transformers describes at length."""
INDENT = 40
"""Columns before a flag's description."""


def asked_for_help(argv: Sequence[str], page: Page) -> bool:
    """Prints the page if the flags ask for it; whether they did."""
    asked = bool({"-h", "--help", "--help_all"} & set(argv))
    if asked:
        print(help_text("--help_all" in argv, min(shutil.get_terminal_size().columns, HELP_WIDTH), page))
    return asked


def help_text(every_flag: bool, width: int, page: Page = TRAIN) -> str:
    """The page; with `every_flag` also what only transformers documents, and what TRL has and we do not."""
    lines = [
        f"usage: fastgrpo {page.command} [--config FILE.yaml] --model_name_or_path MODEL --dataset_name DATA "
        "[--name value …]",
        "",
        "A YAML file holds the same names; flags override it. In parentheses: what is used where a flag is not given.",
        "--num_processes N or --accelerate_config FILE: start several processes.",
    ]
    for title, known in help_groups(every_flag, page).items():
        lines += ["", f"{title}:"]
        for field in known:
            lines += _described(f"  {_flag(field)}", _help(field) + _default(field), width)
    if not every_flag:
        lines += ["", f"`fastgrpo {page.command} --help_all` adds the other settings of transformers' Trainer."]
    return "\n".join(lines)


def _described(flag: str, text: str, width: int) -> list[str]:
    described = textwrap.wrap(text, max(width - INDENT, 20)) or [""]
    if len(flag) > INDENT - 2:
        described.insert(0, "")
    first, *others = described
    return [f"{flag:<{INDENT}}{first}".rstrip(), *(" " * INDENT + line for line in others)]


def help_groups(every_flag: bool, page: Page = TRAIN) -> dict[str, list[Field[Any]]]:
    """Title → the fields behind its flags, in the order of the page."""
    known = {field.name: field for record in page.records for field in fields(record)}
    of_transformers = {field.name for field in fields(TrainingArguments)}
    foreign = known.keys() & (FOREIGN | MAPPED.keys())
    groups = {title: [known[name] for name in names if name in known] for title, names in GROUPS.items()}
    grouped = {name for names in GROUPS.values() for name in names}

    def rest(names: Iterable[str]) -> list[Field[Any]]:
        return [field for name, field in known.items() if name in names and name not in grouped]

    groups[FURTHER] = rest(known.keys() - of_transformers - foreign)
    if every_flag:
        groups["transformers' Trainer"] = rest(of_transformers)
        groups["TRL's, mapped to something else or refused"] = rest(foreign)
    return {title: found for title, found in groups.items() if found}


def _flag(field: Field[Any]) -> str:
    if _kinds(field) <= {bool, type(None)}:
        return f"--[no_]{field.name}" if field.default is True else f"--{field.name}"
    return f"--{field.name} {_value(field)}"


def _value(field: Field[Any]) -> str:
    if get_origin(field.type) is Literal:
        return "|".join(get_args(field.type))
    names = {int: "N", float: "X", str: "TEXT", dict: "JSON"}
    kinds = {get_origin(kind) or kind for kind in _kinds(field)}
    if list in kinds:
        return "VALUE…"
    # A setting that may be given as an object or by name is written as text.
    return next((name for kind, name in names.items() if kind in kinds and kinds <= {kind, type(None)}), "VALUE")


def _kinds(field: Field[Any]) -> set[Any]:
    is_union = get_origin(field.type) in (Union, types.UnionType)
    return set(get_args(field.type)) if is_union else {field.type}


def _help(field: Field[Any]) -> str:
    told = SAID_BETTER.get(field.name) or str(field.metadata.get("help") or "")
    return " ".join(told.replace("%%", "%").split())


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return " (required)"
    if value is None or isinstance(value, bool) or value == "":
        return ""
    shown = value.value if isinstance(value, Enum) else value
    return f" ({' '.join(map(str, shown)) if isinstance(shown, list) else shown})"
