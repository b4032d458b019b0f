"""Settings as dataclass fields that say what their values may be, and the one loop that checks them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a setting's values may be. None stands for "unset" and is always allowed."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()

    def allow(self, value: Any) -> bool:
        """Whether a value is within; a number that is not finite never is."""
        if value is None:
            return True
        if self.choices:
            return value in self.choices
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) == 2 else f"one of {', '.join(self.choices)}"
        if self.at_most is None:
            return f"{self.at_least} or more" if self.above is None else f"a number above {self.above}"
        low = f"from {self.at_least} to" if self.above is None else f"above {self.above} and at most"
        return f"a number {low} {self.at_most}"


class Help(str):
    """A setting's help text, which carries its limits: whatever else stands in a field's metadata, argparse refuses."""

    limits: Limits | None = None


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field with a help text and limits."""
    text = Help(help)
    limits = Limits(at_least, above, at_most, tuple(choices))
    text.limits = None if limits == Limits() else limits
    return field(default=default, metadata={"help": text})


def limits_of(settings: Any, name: str) -> Limits | None:
    """A field's own limits, of a dataclass or an instance of it."""
    found: Limits | None = getattr(settings.__dataclass_fields__[name].metadata.get("help"), "limits", None)
    return found


LARGEST = 2**63 - 1
"""What a counter of 64 bits holds."""


def check_limits(config: Any, inherited: Mapping[str, Limits]) -> None:
    """Checks every field of a dataclass against its own limits, or against those of `inherited`. Numbers that are not
    finite or need more than 64 bits, texts that are empty (but for a default) and NUL characters are allowed in none.

    Raises:
        ValueError: a value outside; the message names the field, the value and what may be used.
    """
    for one in fields(config):
        limits = inherited.get(one.name) or limits_of(config, one.name)
        value = getattr(config, one.name)
        if limits is not None and not limits.allow(value):
            raise ValueError(f"{one.name}={value!r} is not valid: use {limits}.")
        if value != one.default and (fix := next(filter(None, map(_fix, _leaves(value))), None)):
            raise ValueError(f"{one.name}={value!r} is not valid: {fix}.")


def _fix(value: Any) -> str | None:
    """What is to be done about a value that no setting may have."""
    if isinstance(value, str):
        return "give a value, or leave it out" if not value else "take the NUL character out" if "\0" in value else None
    if isinstance(value, float) and not math.isfinite(value):
        return "use finite numbers"
    return f"use a number of at most {LARGEST}" if isinstance(value, int) and abs(value) > LARGEST else None


def _leaves(value: Any) -> Iterator[Any]:
    """The texts and numbers in a setting, however deep in lists and objects."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(one)
    else:
        yield value
