"""Commands and their exit codes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastgrpo import __version__
from fastgrpo.cli import report as report_command
from fastgrpo.cli import train as train_command
from fastgrpo.cli.main import COMMANDS, main


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"fastgrpo {__version__}\n")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "fastgrpo: unknown command 'trian' (did you mean train?)\n"
    assert main(["xyz"]) == 2
    assert capsys.readouterr().err == f"fastgrpo: unknown command 'xyz': use {', '.join(COMMANDS)}\n"


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "run", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "fastgrpo train: interrupted\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="required"):
        main(["train"])


def test_report_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fastgrpo report: error: ")


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'report.html'} cannot be written" in line
    assert line.endswith("Name a file with --out, a folder with --export.")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0


class ConnectError(Exception):
    """As the hub's client raises it; the client itself goes by several names."""

    __module__ = "httpx2"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("two\nlines"), "two lines"),
        (PermissionError(13, "Permission denied", "runs/a"), "runs/a: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectError("no route"), "the network does not answer: no route"),
        (torch.OutOfMemoryError("tried 2 GiB"), "the GPU's memory is full: set gradient_checkpointing"),
    ],
)
def test_mistakes_and_a_machines_limits_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    def failing(argv: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(report_command, "run", failing)
    assert main(["report"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastgrpo report: error: {told}")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(argv: Sequence[str]) -> None:
        raise KeyError("row")

    monkeypatch.setattr(report_command, "run", failing)
    with pytest.raises(KeyError):
        main(["report"])


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ((), "no checkpoint was saved yet: pass --save_steps, the steps between two (now 7)"),
        (("trainer_state.json", "optimizer.pt"), "the same command with --resume_from_checkpoint continues from "),
        (("trainer_state.json",), "its checkpoints hold no optimizer state (save_only_model)"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, ...],
    told: str,
) -> None:
    def interrupted(config: object, script: object) -> None:
        raise KeyboardInterrupt

    for file in files:
        (tmp_path / "checkpoint-3").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-3" / file).touch()
    monkeypatch.setattr(train_command, "run_training", interrupted)
    names = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)]
    assert main(["train", *names, "--save_steps", "7", "--report_to", "none", "--use_cpu"]) == 130
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastgrpo train: interrupted; {told}")
    if len(files) > 1:
        assert line.endswith(str(tmp_path / "checkpoint-3"))
