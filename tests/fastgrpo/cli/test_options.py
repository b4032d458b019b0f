"""Flags of the smaller commands."""

from pathlib import Path

import pytest

from fastgrpo.cli.options import Parser, at_least, require_writable


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="fastgrpo bake")
    parser.add_argument("cake")
    parser.add_argument("--oven_heat", type=at_least(1), default=180)
    return parser


def test_flags_are_read(parser: Parser) -> None:
    assert vars(parser.parse_args(["pie", "--oven_heat", "200"])) == {"cake": "pie", "oven_heat": 200}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["pie", "--oven_heta", "3"], r"unknown argument --oven_heta \(did you mean --oven_heat\?\)"),
        (["pie", "--heat=3"], r"unknown argument --heat \(did you mean --oven_heat\?\)"),
        (["pie", "--qqq"], r"unknown argument --qqq; `fastgrpo bake --help` lists all"),
        (["pie", "tart"], "unknown argument tart"),
        (["pie", "--oven_heat", "0"], "0 is not 1 or more"),
        (["pie", "--oven_heat", "hot"], "'hot' is not a whole number"),
        ([], "required: cake"),
    ],
)
def test_a_mistake_is_told_in_one_line(parser: Parser, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parser.parse_args(flags)
    assert len(str(error.value).splitlines()) == 1


def test_require_writable_makes_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
