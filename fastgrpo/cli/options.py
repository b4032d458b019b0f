"""Options of commands: parsed with mistakes as ValueErrors."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

import torch


class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


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


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ArgumentTypeError(f"{text!r} cannot be used here: {error}") from None
