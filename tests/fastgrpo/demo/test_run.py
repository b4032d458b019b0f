"""The demo, one step of it."""

import shlex
from pathlib import Path

import pytest

from fastgrpo.cli.main import main
from fastgrpo.demo.run import run_demo


@pytest.mark.slow
def test_the_last_line_asks_the_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_demo(tmp_path / "a run", seed=0, steps=1, questions=4)
    assert summary["steps"] == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ask it: ")
    command = shlex.split(last.removeprefix("ask it: "))
    arguments = command[command.index("generate") :]
    assert arguments[1] == str(tmp_path / "a run")
    assert main([*arguments, "--max_new_tokens", "4", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert printed.err.startswith("questions are asked in base mode, template paper")
