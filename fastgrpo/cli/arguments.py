"""The command line of a training run: `GRPOConfig` and `ScriptArguments`, from flags and a YAML file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.config import GRPOConfig


@dataclass
class ScriptArguments:
    """What a run trains, and on what: the model, its data, its rewards, its evaluation."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model to train."})
    dataset_name: str = field(metadata={"help": "Hub id, file (parquet, json, csv) or folder of the training rows."})
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    max_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    single_image_only: bool = field(default=False, metadata={"help": "Leave out rows with several pictures."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Reward functions: accuracy, format, length, or module:function of your own."},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the parameters and the optimizer; --bf16 sets what is computed in."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager."})
    min_pixels: int | None = field(default=None, metadata={"help": "Least area of a picture, height × width."})
    max_pixels: int | None = field(default=None, metadata={"help": "Largest area of a picture, height × width."})
    freeze_vision: bool = field(default=False, metadata={"help": "Freeze the vision tower; its merger trains."})
    freeze_llm: bool = field(default=False, metadata={"help": "Freeze the language model; the merger trains."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the model's own weights."})
    lora_r: int = field(default=16, metadata={"help": "The adapters' rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Their products are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Share of an adapter's inputs dropped in the update."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Layers that get an adapter, by the ends of their names; or all-linear."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole and save beside the adapters, such as merger."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / √lora_r instead."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows (CV-Bench or SAT schema) to score before and after training."}
    )
    eval_split: str = field(default="test", metadata={"help": "Their split on the hub."})
    eval_max_samples: int | None = field(default=None, metadata={"help": "Score the first rows only."})
    eval_max_new_tokens: int = field(default=1024, metadata={"help": "Most tokens in a scored response."})
    eval_pass_at_k: int = field(default=0, metadata={"help": "Also sample k responses a question before training."})
    eval_shuffles: int = field(
        default=1, metadata={"help": "Times to ask all questions about shuffled pictures after training."}
    )

    def __post_init__(self) -> None:
        if self.use_peft and (self.freeze_vision or self.freeze_llm):
            raise ValueError("use_peft=True freezes the whole model already: leave freeze_vision and freeze_llm off.")
        least = {
            "lora_r": 1,
            "max_samples": 1,
            "eval_max_samples": 1,
            "eval_max_new_tokens": 1,
            "eval_pass_at_k": 0,
            "eval_shuffles": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value} is not valid: use {bound} or more.")


class _Parser(HfArgumentParser):
    """Tells a mistake in one line instead of printing 300 flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: Sequence[str]) -> tuple[GRPOConfig, ScriptArguments]:
    """Flags into settings. `--config FILE` reads a YAML file of the same names; flags override it.

    Raises:
        ValueError: an unknown flag or key (with the nearest known one), or a value that does not fit.
    """
    parser = _Parser((GRPOConfig, ScriptArguments), allow_abbrev=False, add_help=False, prog="fastgrpo train")
    known = sorted(option for action in parser._actions for option in action.option_strings)
    flags = _normalise(argv)
    config_files, flags = _take_config(flags)
    # Ahead of the parser, which would only say of a misspelt required flag that it is missing.
    if unknown := next((token for token in flags if token.startswith("--") and token not in known), None):
        raise ValueError(f"unknown argument {unknown}{_hint(unknown, known)}")
    from_files = [token for file in config_files for token in _yaml_flags(file, known)]
    *parsed, stray = parser.parse_args_into_dataclasses([*from_files, *flags], return_remaining_strings=True)
    if stray:
        raise ValueError(f"unknown argument {stray[0]}: settings are given as --name value")
    config, script = parsed
    return config, script


def _normalise(argv: Sequence[str]) -> list[str]:
    """`--a=b` split in two, and `--resume_from_checkpoint` without a value given `last`."""
    tokens = [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]
    result = []
    for i, token in enumerate(tokens):
        result.append(token)
        if token == "--resume_from_checkpoint" and (i + 1 == len(tokens) or tokens[i + 1].startswith("--")):
            result.append("last")
    return result


def _take_config(tokens: list[str]) -> tuple[list[Path], list[str]]:
    files, rest = [], []
    iterator = iter(tokens)
    for token in iterator:
        if token == "--config":
            value = next(iterator, None)
            if value is None:
                raise ValueError("--config needs a file: --config configs/demo.yaml")
            files.append(Path(value))
        else:
            rest.append(token)
    return files, rest


def _yaml_flags(file: Path, known: Sequence[str]) -> list[str]:
    """A YAML mapping as flags, so that both are checked in one way."""
    try:
        settings = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {file} should map setting names to values")
    flags: list[str] = []
    for name, value in settings.items():
        if f"--{name}" not in known:
            raise ValueError(f"--config {file}: unknown setting {name}{_hint(f'--{name}', known)}")
        if value is not None:
            flags += [f"--{name}", *_flag_values(value)]
    return flags


def _flag_values(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _hint(flag: str, known: Sequence[str]) -> str:
    return did_you_mean(flag, known, "; `fastgrpo train --help` lists all")
