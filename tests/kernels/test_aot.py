"""Every kernel compiles for sm_90 without spills, and `bench/aot.py` finds the faults it is there to find."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot_compile import Launch

ROOT = Path(__file__).parents[2]


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since these tests run under Triton's interpreter and that one must not."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [ROOT / "kernels", ROOT / "tests" / "kernels", os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, ROOT / "bench" / "aot.py", *arguments],
        env={**inherited, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment},
        capture_output=True,
        text=True,
    )


def record_of(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.stdout.strip(), run.stderr
    record: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return record


def test_shipped_kernels_compile_without_spills():
    run = run_aot("--arch", "90", "--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    figures = record_of(run)["figures"]
    assert figures["kernels"] > 0
    assert (figures["failed"], figures["spilling_sm90"], figures["no_tensor_core_sm90"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 100, 120])
def test_they_do_on_other_architectures(arch: int):
    run = run_aot("--arch", str(arch), "--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    figures = record_of(run)["figures"]
    assert figures["kernels"] > 0
    assert (figures["failed"], figures[f"spilling_sm{arch}"]) == (0, 0)


def test_sound_kernels_pass_and_equal_launches_count_once():
    run = run_aot("--arch", "90", "--module", "toy_kernels", "--module", "toy_kernels")
    assert run.returncode == 0, run.stdout + run.stderr
    figures = record_of(run)["figures"]
    assert (figures["kernels"], figures["configs"]) == (1, 2)
    assert "HGMMA" in run.stdout
    assert all(column in run.stdout for column in ("occupancy", "waves", "tail", "floor"))


def test_faults_are_counted_and_named():
    run = run_aot("--arch", "90", "--module", "faulty_toy_kernels")
    assert run.returncode == 1, run.stderr
    record = record_of(run)
    assert record["checks_passed"] is False
    assert (record["figures"]["failed"], record["figures"]["spilling_sm90"]) == (2, 1)
    for finding in ("sm_90 spilling_kernel: ", "232448 at most (too much shared memory)", "power of 2 (broken)"):
        assert finding in run.stdout


def test_a_half_precision_dot_without_tensor_cores_is_a_fault():
    slow = Launch(90, "kernel", "case", "digest", registers=1, has_dot=True)
    assert slow.faults == ["a dot without tensor cores"]
    exempt = Launch(90, "kernel", "case", "digest", registers=1, has_dot=True, ieee=True)
    assert exempt.faults == []


def test_the_interpreter_is_refused():
    run = run_aot("--arch", "90", TRITON_INTERPRET="1")
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr
