"""The parser of the smaller commands, and the types of their options."""

import math
import os
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastgrpo.cli.suggestions import did_you_mean


class Parser(ArgumentParser):
    """Tells a mistake in one line, with the flag that was probably meant."""

    def __init__(self, **settings: Any) -> None:
        self.flags: list[str] = []
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> Action:
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Namespace:  # type: ignore[override]
        options, rest = self.parse_known_intermixed_args(args, namespace)  # flags may stand between positionals
        for token in rest:
            flag = token.split("=", 1)[0]
            hint = did_you_mean(flag, self.flags, f"; `{self.prog} --help` lists all") if flag.startswith("--") else ""
            raise ValueError(f"unknown argument {flag}{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        raise ValueError(with_fix(message))


def with_fix(message: str) -> str:
    """argparse's message, which tells a Python type where it should tell what to write."""
    wanted = {"invalid int value": "use a whole number", "invalid float value": "use a number"}
    return message + next((f": {fix}" for said, fix in wanted.items() if said in message), "")


def at_least(minimum: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise ArgumentTypeError(f"{value} is not {minimum} or more")
        return value

    return parse_number


def between(low: float, high: float = math.inf) -> Callable[[str], float]:
    def parse_number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high or math.isinf(value):
            limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
            raise ArgumentTypeError(f"{text} is not {limits}")
        return value

    return parse_number


def require_no_splits(dataset: str, given: Sequence[str]) -> None:
    """Raises ValueError where settings that only a data set on the hub has are given for a file, or for a folder of
    `save_to_disk`."""
    path = Path(dataset).expanduser()
    if (path / "dataset_dict.json").is_file():
        given, kind = [name for name in given if not name.endswith("split")], "of saved splits, without configurations"
    elif (path / "state.json").is_file():
        kind = "one saved split: it has no others, and no configurations"
    else:
        given, kind = given if path.is_file() else [], "a file, which has neither splits nor configurations"
    if given:
        raise ValueError(f"{', '.join(given)}: {dataset} is {kind}: leave it out")


def require_writable(folder: Path) -> None:
    """Raises ValueError unless files can be written into `folder`, which is created when missing."""
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error.strerror}. Choose another.") from error
