import io

import pytest
from rich.rule import Rule
from rich.table import Table

from fastgrpo.safe_text.inert import inert
from fastgrpo.safe_text.terminal import Terminal

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "[/b]",
    "[link=http://x]y[/link]",
    "\x1b]8;;http://x\x1b\\\\",
    ":smile:",
    "a\u202eb",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_shows_texts_and_does_nothing_of_what_they_say(text: str) -> None:
    output = io.StringIO()
    terminal = Terminal(file=output, force_terminal=True, color_system=None, width=200)
    terminal.print(text)
    table = Table(text, title=text)
    table.add_row(text)
    terminal.print(table)
    terminal.print(Rule(text))
    shown = output.getvalue()
    assert shown.count(inert(text)) == 5
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_inert_text_can_be_encoded_and_ordinary_text_stays() -> None:
    assert inert("half \ud800 of a pair").encode() == rb"half \ud800 of a pair"
    for text in ("two\nlines\tand a tab", "é 漢字 😀 ±", ""):
        assert inert(text) == text
    assert inert("a\rb\x00") == r"a\rb\x00"
