"""The command line of a training run: its settings and script arguments, from flags and a YAML file."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from fastgrpo.cli.launch import LAUNCH_FLAGS
from fastgrpo.cli.options import with_fix
from fastgrpo.cli.run_arguments import ScriptArguments, SFTArguments
from fastgrpo.cli.suggestions import did_you_mean
from fastgrpo.config import GRPOConfig
from fastgrpo.settings.batch_plan import PartialGroupsError
from fastgrpo.settings.given import given
from fastgrpo.settings.sft_config import SFTConfig

logger = logging.get_logger(__name__)


class _Parser(HfArgumentParser):
    """Tells a mistake in one line instead of printing 300 flags."""

    def __init__(self, *records: Any, **settings: Any) -> None:
        super().__init__(*records, **settings)
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)")  # argparse takes -1e-6 for a flag

    def error(self, message: str) -> NoReturn:
        raise ValueError(with_fix(message))


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would keep the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse(argv: Sequence[str]) -> tuple[GRPOConfig, ScriptArguments]:
    """Flags of `fastgrpo train` into settings. `--config FILE` reads a YAML file of the same names; flags override it.

    Where a rank's completions are fewer than a group, as in VisualThinker's scripts, its batch counts prompts.

    Raises:
        ValueError: an unknown flag or key (with the nearest known one), or a value that does not fit.
    """
    parser, tokens = _read(argv, "train", GRPOConfig, ScriptArguments)
    try:
        return _parsed(parser, tokens)
    except PartialGroupsError as error:
        if "--batch_unit" in tokens or error.completions >= error.group:
            raise
        config, script = _parsed(parser, [*tokens, "--batch_unit", "prompts"])
        logger.warning(
            f"per_device_train_batch_size={config.per_device_train_batch_size} is taken for prompts (--batch_unit "
            f"prompts): {error.completions} completions a rank are no group of {error.group}."
        )
        return config, script


def parse_sft(argv: Sequence[str]) -> tuple[SFTConfig, SFTArguments]:
    """Flags of `fastgrpo sft` into settings, likewise."""
    parser, tokens = _read(argv, "sft", SFTConfig, SFTArguments)
    config, script = _parsed(parser, tokens)
    if script.max_seq_length is not None:
        config.max_length = script.max_seq_length
    for counts_answers_alone in (script.completion_only_loss, script.assistant_only_loss):
        if counts_answers_alone is not None:
            config.train_on_prompt = not counts_answers_alone
    return config, script


def _read(argv: Sequence[str], command: str, *records: Any) -> tuple[_Parser, list[str]]:
    """The parser of the records, and the flags of files and command line, names checked."""
    parser = _Parser(records, allow_abbrev=False, add_help=False, prog=f"fastgrpo {command}")
    known = _flags_of(parser)
    flags = _normalise(argv)
    config_files, flags = _take_config(flags)
    hint = Hint(command, known)
    # Ahead of the parser, which would only say of a misspelt required flag that it is missing.
    if unknown := next((token for token in flags if token.startswith("--") and token not in known), None):
        raise ValueError(f"unknown argument {unknown}{hint(unknown)}")
    return parser, [*(token for file in config_files for token in _yaml_flags(file, hint)), *flags]


def known_settings(command: str) -> list[str]:
    """The names of all settings of a program: train or sft."""
    records = {"train": (GRPOConfig, ScriptArguments), "sft": (SFTConfig, SFTArguments)}[command]
    return [flag.removeprefix("--") for flag in _flags_of(_Parser(records, add_help=False))]


def _flags_of(parser: _Parser) -> list[str]:
    return sorted(option for action in parser._actions for option in action.option_strings)


def _parsed(parser: _Parser, tokens: Sequence[str]) -> Any:
    *parsed, stray = parser.parse_args_into_dataclasses(list(tokens), return_remaining_strings=True)
    if stray:
        before = tokens[: tokens.index(stray[0])]
        flag = next((f" behind {token}" for token in reversed(before) if token.startswith("--")), "")
        raise ValueError(f"unknown argument {stray[0]}{flag}: settings are given as --name value")
    return parsed


class Hint:
    """The end of a message about an unknown flag of a command."""

    def __init__(self, command: str, known: Sequence[str]) -> None:
        self.command = command
        self.known = known

    def __call__(self, flag: str) -> str:
        return did_you_mean(flag, self.known, f"; `fastgrpo {self.command} --help` lists all")


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
            if value is None or value.startswith("--"):
                raise ValueError("--config needs a file: --config configs/demo.yaml")
            files.append(Path(value))
        else:
            rest.append(token)
    return files, rest


def read_settings(file: Path) -> dict[str, Any]:
    """A YAML file that maps names to values.

    Raises:
        ValueError: no such file, not YAML, a name given twice, or no mapping.
    """
    try:
        settings = yaml.load(file.read_text(), _StrictLoader)  # a SafeLoader
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} should map setting names to values")
    return settings


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line's tokens; those that are None are left out."""
    given = {name: _flag_values(value) for name, value in settings.items() if value is not None}
    return [token for name, values in given.items() for token in (f"--{name}", *values)]


def _yaml_flags(file: Path, hint: Hint) -> list[str]:
    """A YAML mapping as flags, so that both are checked in one way. Its `env` goes into the environment."""
    try:
        settings = read_settings(file)
    except ValueError as error:
        raise ValueError(f"--config {error}") from error
    for key, text in _mapping_of(settings.pop("env", {}), f"--config {file}: env").items():
        with given(f"--config {file}: env: {key!r}={text!r} is no variable", "Use NAME: value."):
            os.environ[str(key)] = str(text)
    settings = {name: value for name, value in settings.items() if name not in LAUNCH_FLAGS}
    for unknown in (name for name in settings if f"--{name}" not in hint.known):
        raise ValueError(f"--config {file}: unknown setting {unknown}{hint(f'--{unknown}')}")
    for name, value in settings.items():
        if isinstance(value, dict):
            with given(f"--config {file}: {name}={value} cannot be JSON", "Use texts, numbers, lists and objects."):
                json.dumps(value)
    return as_flags(settings)


def _mapping_of(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: it should map names to values")
    return value


def _flag_values(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(item) for item in (value if isinstance(value, list) else [value])]
