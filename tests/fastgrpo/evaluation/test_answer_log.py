"""Answers kept on disk, and taken up again whatever the kill cut off."""

from pathlib import Path
from typing import Any

import pytest

from fastgrpo.evaluation.answer_log import AnswerLog
from fastgrpo.evaluation.ranks import Ranks

KEY = {"model": "m", "seed": 0}


def answer(text: str) -> dict[str, Any]:
    return {"completion": text, "thumbnail": b"\xff\xd8\xff", "task": None, "correct": True, "length": 3}


@pytest.fixture
def log(tmp_path: Path) -> AnswerLog:
    """Two answers of a pass, one of another."""
    log = AnswerLog(tmp_path / "answers", KEY)
    log.add("greedy", 0, [answer("zéro\n")])
    log.add("greedy", 7, [answer("seven")])
    log.add("sampled", 7, [answer("a"), answer("b")])
    return log


def test_answers_come_back_as_they_were(log: AnswerLog) -> None:
    found = AnswerLog(log.folder, KEY).kept  # what a kill leaves: nothing was closed
    assert found == {
        ("greedy", 0): [answer("zéro\n")],
        ("greedy", 7): [answer("seven")],
        ("sampled", 7): [answer("a"), answer("b")],
    }


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_line_that_was_cut_off_is_asked_again(log: AnswerLog, cut: int) -> None:
    content = log.file.read_bytes()
    log.file.write_bytes(content[:-cut])
    again = AnswerLog(log.folder, KEY)
    assert set(again.kept) - {("sampled", 7)} == {("greedy", 0), ("greedy", 7)}
    again.add("greedy", 9, [answer("nine")])
    assert set(AnswerLog(log.folder, KEY).kept) == {*again.kept, ("greedy", 9)}


def test_answers_to_something_else_are_dropped(log: AnswerLog) -> None:
    other = AnswerLog(log.folder, KEY | {"seed": 1})
    assert other.kept == {}
    other.add("greedy", 1, [answer("one")])
    assert set(AnswerLog(log.folder, KEY | {"seed": 1}).kept) == {("greedy", 1)}
    assert AnswerLog(log.folder, KEY).kept == {}


def test_every_rank_finds_all_answers(log: AnswerLog) -> None:
    second = AnswerLog(log.folder, KEY, Ranks(1, 2))
    second.add("greedy", 1, [answer("one")])
    assert set(AnswerLog(log.folder, KEY, Ranks(0, 3)).kept) == {*log.kept, *second.kept, ("greedy", 1)} | {
        ("greedy", 0), ("greedy", 7), ("sampled", 7),
    }  # fmt: skip
    assert len(list(log.folder.iterdir())) == 2


def test_nothing_is_left(log: AnswerLog) -> None:
    log.remove()
    assert not log.folder.exists()
    log.remove()
