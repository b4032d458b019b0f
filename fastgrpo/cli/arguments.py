"""The command line of a training run: `GRPOConfig` and `ScriptArguments`, from flags and a YAML file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from fastgrpo.cli.options import require_no_splits
from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.config import GRPOConfig
from fastgrpo.limits import check_limits, option


@dataclass
class ScriptArguments:
    """Model, data, rewards and evaluation of a run."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model to train, or of adapters."})
    dataset_name: str = field(metadata={"help": "Hub id, file (parquet, json, csv) or folder of the training rows."})
    dataset_config: str | None = option(None, "The data set's configuration on the hub.")
    dataset_train_split: str = option("train", "Its split to train on.")
    max_samples: int | None = option(None, "Train on the first rows only.", at_least=1)
    single_image_only: bool = option(False, "Leave out rows with several pictures.")
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Reward functions: accuracy, format, length, or module:function of a file of yours."},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "Of the parameters and the optimizer; --bf16 sets what is computed in."
    )
    attn_implementation: str | None = option(None, "sdpa, flash_attention_2, eager.")
    min_pixels: int | None = option(None, "Least area of a picture, height × width.", at_least=1)
    max_pixels: int | None = option(None, "Largest area of a picture, height × width.", at_least=1)
    freeze_vision: bool = option(False, "Freeze the vision tower; its merger trains.")
    freeze_llm: bool = option(False, "Freeze the language model; the merger trains.")
    use_peft: bool = option(False, "Train LoRA adapters instead of the model's own weights.")
    lora_r: int = option(16, "The adapters' rank.", at_least=1)
    lora_alpha: int = option(32, "Their products are scaled by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = option(0.05, "Share of an adapter's inputs dropped in the update.", at_least=0, at_most=1)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Layers that get an adapter, by the ends of their names; or all-linear."},
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Modules to train whole and save beside the adapters, such as merger."
    )
    use_rslora: bool = option(False, "Scale by lora_alpha / √lora_r instead.")
    eval_dataset_name: str | None = option(
        None, "Held-out rows (CV-Bench or SAT schema) to score before and after training."
    )
    eval_split: str = option("test", "Their split on the hub.")
    eval_max_samples: int | None = option(None, "Score the first rows only.", at_least=1)
    eval_max_new_tokens: int = option(1024, "Most tokens in a scored response.", at_least=1)
    eval_pass_at_k: int = option(0, "Also sample k responses a question before training.", at_least=0)
    eval_shuffles: int = option(1, "Times to ask all questions about shuffled pictures after training.", at_least=0)

    def __post_init__(self) -> None:
        check_limits(self, {})
        if self.use_peft and (self.freeze_vision or self.freeze_llm):
            raise ValueError("use_peft=True freezes the whole model already: leave freeze_vision and freeze_llm off.")
        unused = [field.name for field in fields(self) if field.name.startswith("lora_")] + ["use_rslora"]
        if not self.use_peft and (given := changed(self, unused)):
            raise ValueError(f"{', '.join(given)}: set without use_peft, so no adapters would be trained: add it.")
        require_no_splits(self.dataset_name, changed(self, ("dataset_config", "dataset_train_split")))
        require_no_splits(self.eval_dataset_name or "", changed(self, ("eval_split",)))


def changed(settings: Any, names: Iterable[str]) -> list[str]:
    """The names among `names` whose value is not the field's default."""
    known = {field.name: field for field in fields(settings)}
    return [name for name in names if getattr(settings, name) != _default(known[name])]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


class _Parser(HfArgumentParser):
    """Tells a mistake in one line instead of printing 300 flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would keep the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


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
        settings = yaml.load(file.read_text(), _StrictLoader)  # a SafeLoader
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
