"""What TRL's scripts import beside trainer and settings: dataclasses of flags, and what is made from them.

Names, fields and defaults are those of TRL 1.16.
"""

from __future__ import annotations

import os
import sys
from argparse import Action, ArgumentParser
from argparse import _SubParsersAction as SubParsers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig
from transformers import BitsAndBytesConfig, HfArgumentParser

from fastgrpo.settings.limits import check_limits, option

try:
    import datasets
except ImportError:  # a machine that only measures may lack it
    datasets = None


@dataclass
class ScriptArguments:
    """A script's data set: a path or hub id, and its splits."""

    dataset_name: str | None = option(None, "Path or hub id of the data set.")
    dataset_config: str | None = option(None, "Its configuration.")
    dataset_train_split: str = option("train", "The split to train on.")
    dataset_test_split: str = option("test", "The split to evaluate on.")
    dataset_streaming: bool = option(False, "Read it as a stream.")
    ignore_bias_buffers: bool = option(False, "Accepted so that TRL scripts run; has no effect.")


@dataclass
class ModelConfig:
    """A script's model, its adapters and the bits of its weights."""

    model_name_or_path: str | None = option(None, "Hub id or folder of the model.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    dtype: str | None = option("float32", "Of the parameters.", choices=("auto", "bfloat16", "float16", "float32"))
    attn_implementation: str | None = option(None, "sdpa, flash_attention_2, eager.")
    use_peft: bool = option(False, "Train LoRA adapters.")
    lora_r: int = option(16, "Their rank.")
    lora_alpha: int = option(32, "Their products are scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Share of an adapter's inputs that is dropped.")
    lora_target_modules: list[str] | None = option(None, "Layers that get an adapter.")
    lora_target_parameters: list[str] | None = option(None, "Parameters that get an adapter.")
    lora_modules_to_save: list[str] | None = option(None, "Modules to train whole.")
    lora_task_type: str = option("CAUSAL_LM", "peft's task type.")
    use_rslora: bool = option(False, "Scale by lora_alpha / √lora_r.")
    use_dora: bool = option(False, "Learn the length of each weight's rows apart from their direction.")
    load_in_8bit: bool = option(False, "Load the base with weights of 8 bits.")
    load_in_4bit: bool = option(False, "Load the base with weights of 4 bits.")
    bnb_4bit_quant_type: str = option("nf4", "The kind of 4 bits.", choices=("fp4", "nf4"))
    use_bnb_nested_quant: bool = option(False, "Quantize the scales too.")
    bnb_4bit_quant_storage: str | None = option(None, "The dtype that 4-bit weights are stored in.")

    def __post_init__(self) -> None:
        check_limits(self, {})
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other: set one.")
        if self.lora_target_modules is not None and len(self.lora_target_modules) == 1:
            # A lone name may be a pattern, or all-linear, which peft takes as a text only.
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]


@dataclass
class DatasetConfig:
    """One data set of a mixture; the first five are arguments of `datasets.load_dataset`."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    """Columns to keep; all if None."""
    fraction: float | None = None
    """Share of the mixture; set for all of its data sets or for none."""


@dataclass
class DatasetMixtureConfig:
    """Several data sets, joined; in a YAML file a list under `datasets`."""

    datasets: list[DatasetConfig] = field(default_factory=list, metadata={"help": "The data sets of a mixture."})
    streaming: bool = option(False, "Read them as streams.")
    test_split_size: float | None = option(None, "Size of a test split to cut off.")

    def __post_init__(self) -> None:
        self.datasets = [DatasetConfig(**one) if isinstance(one, dict) else one for one in self.datasets]


class TrlParser(HfArgumentParser):
    """Flags into dataclasses, with defaults from a YAML file: `--config FILE`. Its `env` are environment variables."""

    def __init__(self, dataclass_types: Any = None, **settings: Any) -> None:
        kinds = [] if dataclass_types is None else dataclass_types
        kinds = list(kinds) if isinstance(kinds, Iterable) else [kinds]
        if taken := next((kind for kind in kinds if "config" in kind.__dataclass_fields__), None):
            raise ValueError(
                f"{taken.__name__} has a field `config`, which is the flag of the settings file: rename it."
            )
        super().__init__(dataclass_types=kinds, **settings)

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """An instance of each dataclass; flags override the file.

        Args:
            args: the command line; default that of the process.
            return_remaining_strings: also returns what nobody knows, last; the file's first.
            fail_with_unknown_args: of the file. Those of the command line always fail, unless returned.
            separate_remaining_strings: returns the file's and the command line's apart.

        Raises:
            ValueError: an unknown setting, or a file that is no mapping.
        """
        words = list(sys.argv[1:] if args is None else args)
        from_file: list[str] = []
        if "--config" in words:
            place = words.index("--config")
            file = words[place + 1 : place + 2]
            if not file:
                raise ValueError("--config needs a file")
            del words[place : place + 2]
            from_file = self.set_defaults_with_config(**_read_settings(file[0]))
        *parsed, rest = self.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
        if return_remaining_strings:
            return (*parsed, from_file, rest) if separate_remaining_strings else (*parsed, [*from_file, *rest])
        if rest:
            raise ValueError(f"unknown arguments: {rest}")
        if fail_with_unknown_args and from_file:
            raise ValueError(f"unknown arguments in the settings file: {from_file}. Take them out.")
        return tuple(parsed)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Makes settings the defaults of their flags, those of subcommands too; what no flag has, as words."""
        used = set()
        for action in _actions(self):
            if action.dest in settings:
                action.default, action.required = settings[action.dest], False
                used.add(action.dest)
        return [word for name, value in settings.items() if name not in used for word in (f"--{name}", str(value))]


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    for action in parser._actions:
        if isinstance(action, SubParsers):
            for one in action.choices.values():
                yield from _actions(one)
        else:
            yield action


def _read_settings(file: str) -> dict[str, Any]:
    settings = yaml.safe_load(Path(file).read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"--config {file} should map setting names to values")
    variables = settings.pop("env", {})
    if not isinstance(variables, dict):
        raise ValueError(f"--config {file}: env should map names to values")
    os.environ.update({name: str(value) for name, value in variables.items()})
    return settings


def get_dataset(mixture: DatasetMixtureConfig) -> datasets.DatasetDict:
    """Loads and joins a mixture, as the split `train`, and `test` where one is cut off.

    With fractions, the mixture is as large as it can be without a row coming twice; the first rows of each are kept.

    Raises:
        ValueError: no data sets, or fractions of some alone or of streams.
    """
    if not mixture.datasets:
        raise ValueError("datasets is empty: name at least one.")
    parts = []
    for one in mixture.datasets:
        part = datasets.load_dataset(
            path=one.path, name=one.name, data_dir=one.data_dir, data_files=one.data_files, split=one.split,
            streaming=mixture.streaming,
        )  # fmt: skip
        parts.append(part if one.columns is None else part.select_columns(one.columns))
    fractions = [one.fraction for one in mixture.datasets]
    if any(fraction is not None for fraction in fractions):
        if None in fractions:
            raise ValueError("fraction: set it for every data set of the mixture, or for none.")
        if mixture.streaming:
            raise ValueError("fraction: the rows of a stream cannot be counted. Leave streaming off.")
        shares = [fraction / sum(fractions) for fraction in fractions]  # type: ignore[arg-type,operator]
        whole = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share > 0)
        parts = [part.select(range(round(share * whole))) for part, share in zip(parts, shares, strict=True)]
    joined = datasets.concatenate_datasets(parts)
    if mixture.test_split_size is not None:
        return joined.train_test_split(test_size=mixture.test_split_size)
    return datasets.DatasetDict({"train": joined})


def get_peft_config(model: ModelConfig) -> LoraConfig | None:
    """The adapters that a script's flags ask for; None without `use_peft`."""
    if not model.use_peft:
        return None
    targets = {} if model.lora_target_parameters is None else {"target_parameters": model.lora_target_parameters}
    return LoraConfig(
        task_type=model.lora_task_type,
        r=model.lora_r,
        target_modules=model.lora_target_modules,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        bias="none",
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        modules_to_save=model.lora_modules_to_save,
        **targets,
    )


def get_quantization_config(model: ModelConfig) -> BitsAndBytesConfig | None:
    """The bits that a script's flags ask for; None for whole weights."""
    if model.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=model.dtype,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
            bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model.load_in_8bit else None


def get_kbit_device_map() -> dict[str, int] | None:
    """Puts a quantized model on this process's own GPU; None without one."""
    return {"": PartialState().local_process_index} if torch.cuda.is_available() else None
