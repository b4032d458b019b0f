"""Two ranks, one of which dies: the other ends too, and one line names who died and of what."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign import RESULTS, report

LAUNCHER_S, WAITING_S = 30, 12
"""Within which all have ended after a rank has died; how long one may keep the others waiting (`ddp_timeout`)."""
REWARDS = """
import ctypes, os, signal, time
from pathlib import Path

from fastgrpo.data.prompts import PromptCollator

CALLS = []

def fail():
    Path(os.environ["DEATH"]).touch()
    {death}

def dies(completion_ids, **_):
    CALLS.append(1)
    if os.environ["RANK"] == "1" and len(CALLS) == 2 and {in_reward}:
        fail()
    return [float(sum(ids) % 7) for ids in completion_ids]

if os.environ["RANK"] == "1" and not {in_reward}:
    PromptCollator.__call__ = lambda self, rows: fail()
"""
IN_A_REWARD = r"on rank 1: reward function 'dies' "
DEATHS: dict[str, tuple[str, int, str]] = {
    "raises in a reward": ("raise KeyError('id')", 2, IN_A_REWARD + "failed on 4 completions: KeyError: 'id'"),
    "hangs in a reward": ("time.sleep(10**6)", 1, r"rank 1 \(process \d+ on .*\) is in fail \(.*deaths\.py:\d+\)"),
    "os._exit(3)": ("os._exit(3)", 3, r"rank 1 \(process \d+\) ended without a word, with exit code 3"),
    "os._exit(0)": ("os._exit(0)", 2, r"on rank 0: rank 1 \(process \d+ on .*\) has ended"),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", 137, r"rank 1 \(process \d+\) was killed by SIGKILL"),
    "SIGSEGV": ("ctypes.string_at(0)", 139, r"rank 1 \(process \d+\) was killed by SIGSEGV"),
    "SIGSTOP": ("os.kill(os.getpid(), signal.SIGSTOP)", 1, r"rank 1 \(process \d+ on .*\) is stopped; the others"),
    "MemoryError": ("raise MemoryError()", 2, IN_A_REWARD + "failed on 4 completions: MemoryError"),
    "sys.exit": ("raise SystemExit(0)", 2, IN_A_REWARD + r"called exit\(0\)"),
    "data cannot be read": ("raise OSError(5, 'Input/output error', 'rows')", 2, "on rank 1: rows: Input/output error"),
    "SIGTERM to one": ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
}


def still_running(mark: str) -> list[int]:
    """Processes whose environment holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("name", list(DEATHS)[: None if RESULTS else 1])
def test_a_rank_dies(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    death, expected_code, cause = DEATHS[name]
    in_reward = name != "data cannot be read"
    (tmp_path / "deaths.py").write_text(REWARDS.format(death=death, in_reward=in_reward))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(tmp_path), *(os.path.abspath(entry) for entry in sys.path if entry)]
    mark = str(tmp_path / "died")
    environment = os.environ | {"DEATH": mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    flags = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file), "--use_cpu"]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_steps", "500", "--max_completion_length", "4"]
    flags += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--report_to", "none"]
    flags += ["--reward_funcs", "deaths:dies", "--num_processes", "2", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "fastgrpo", "train", *flags, "--ddp_timeout", str(WAITING_S)]
    with (tmp_path / "log.txt").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not Path(mark).exists() and run.poll() is None:
            time.sleep(0.05)
        code = run.wait(LAUNCHER_S + WAITING_S + 30)  # more, where the machine is slow
        seconds = time.time() - Path(mark).stat().st_mtime
    finally:
        left = still_running(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "log.txt").read_text()
    errors = [line for line in said.splitlines() if ": error" in line]
    assert code == expected_code, f"{code}: {said}"
    assert len(errors) == bool(cause), said
    assert all(re.search(cause, line) for line in errors), said
    assert "Traceback" not in said, said
    assert not left, "processes are left"
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    if not cause:
        assert list((tmp_path / "run").glob("checkpoint-*/manifest.json")), said
    last = (errors or ["its steps are saved"])[0].replace(str(tmp_path), "…")
    row = {name: f"ended after {seconds:.0f} s with {code}: {last}"}
    report(capsys, "ranks", row, total=lambda rows: {"deaths": len(rows)})
