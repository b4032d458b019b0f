"""Two runs in one output folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.run_lock import RunLock
from fastgrpo.training.trainer import GRPOTrainer

HOLDER = """
import os, sys
from pathlib import Path
from fastgrpo.training.run_lock import RunLock

with RunLock(Path(sys.argv[1])).held():
    if is_worker := not os.fork():  # such as a data loader's, which outlives a killed run by seconds
        print("held", flush=True)
    sys.stdin.read()
    if is_worker:
        os._exit(0)
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `tmp_path` until it is killed."""
    root = Path(__file__).parents[3]
    sources = os.pathsep.join(str(root / name) for name in ("", "kernels", "profiling"))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": sources},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_live_run_is_left_alone(
    other: subprocess.Popen[str], tiny_model_dir: Path, sat_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=8)
    trainer = GRPOTrainer(str(tiny_model_dir), "format", config, load_rows(str(sat_file)))
    owner = f"process {other.pid} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=f"is in use by {owner}: choose another folder, or wait"):
        trainer.train()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n', "nothing of it is moved away"


def test_what_a_killed_run_left_is_taken_over(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.kill()
    other.wait()
    assert (tmp_path / ".lock").exists()
    with RunLock(tmp_path).held():
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    folder, lock = tmp_path / "new", RunLock(tmp_path / "new")
    with lock.held(), lock.held(), pytest.raises(ValueError, match=f"process {os.getpid()} on"), RunLock(folder).held():
        pass
    assert list(folder.iterdir()) == []
    with RunLock(folder).held():
        pass
