"""Lines that tell how far a command is."""

import time

import pytest

from fastgrpo.cli.console import progress_lines


def test_progress_lines_come_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = progress_lines("scoring", every_seconds=5.0)
    for done in (10, 20, 30):
        progress(done, 30)
    assert capsys.readouterr().err.splitlines() == ["scoring: 20/30 questions", "scoring: 30/30 questions"]
