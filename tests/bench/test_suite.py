"""The suite around its stages: what fails, hangs or is killed costs nothing else."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import harness
import pytest
import suite
from stages import Stage

BENCH = Path(suite.__file__).parent
FOUND = {"checks": {"right": True}, "ratios": {"time_vs_torch": 2.0}, "figures": {"ms": 1.0}}
SAY = f"import os, sys, signal; os.read(0, 1); print({json.dumps(json.dumps(FOUND))}, flush=True); "
CHILDREN = {
    "passes": SAY,
    "raises": SAY + "sys.exit('no luck')",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "dies_speaking": SAY + "print('{\"checks', end='', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": SAY + "signal.pause()",
    "is_wrong": SAY.replace("true", "false"),
    "lacks_something": 'print(\'{"skipped": "nothing to run it with"}\')',
}


def stage(name: str, tiny: int) -> Stage:
    return Stage(name, "", h100=0, h200=0, gigabytes=0, tiny=tiny)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the stages, processes that do what their name says."""

    def start(name: str, options: Any, log: Path) -> "subprocess.Popen[str]":
        with log.open("a") as printed:
            return subprocess.Popen(
                [sys.executable, "-c", CHILDREN[name]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                start_new_session=True,
            )

    monkeypatch.setattr(suite, "start_stage", start)
    monkeypatch.setattr(suite, "STAGES", [stage(name, 0 if name == "hangs" else 30) for name in CHILDREN])
    monkeypatch.setattr(suite, "LEAST_LIMIT", 2.0)
    monkeypatch.setattr(suite, "process_age", lambda: 0.0)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the stages in the results file."""
    monkeypatch.setattr(sys, "argv", ["suite.py", "--device", "cpu", "--scale", "smoke", "--out", str(out), *flags])
    code = suite.main()
    return code, json.loads(out.read_text())["stages"] if out.exists() else {}


@pytest.mark.usefixtures("children")
def test_each_stage_ends_in_its_own_way(monkeypatch, tmp_path, capsys):
    code, stages = run(monkeypatch, tmp_path / "cpu.json")
    assert code == 1
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "passes": "passed",
        "raises": "error",
        "crashes": "error",
        "dies_speaking": "error",
        "hangs": "cut off",
        "is_wrong": "failed",
        "lacks_something": "skipped",
    }
    assert "no luck" in stages["raises"]["note"]
    assert stages["is_wrong"]["note"] == "wrong: right"
    assert stages["lacks_something"]["note"] == "nothing to run it with"
    for name in ("passes", "raises", "dies_speaking", "hangs"):
        assert stages[name]["figures"] == {"ms": 1.0}, "what it found before is kept"
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["checks_passed"] is False
    assert last["ratios"]["passes: time_vs_torch"] == 2.0


@pytest.mark.usefixtures("children")
def test_a_later_run_replaces_what_it_runs_and_keeps_the_rest(monkeypatch, tmp_path):
    out = tmp_path / "cpu.json"
    assert run(monkeypatch, out, "--only", "passes")[0] == 0
    monkeypatch.setitem(CHILDREN, "raises", SAY)
    code, stages = run(monkeypatch, out, "--skip", "crashes", "dies_speaking", "hangs", "is_wrong", "passes")
    assert code == 0
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "passes": "passed",
        "raises": "passed",
        "lacks_something": "skipped",
    }
    assert "--only passes" in stages["passes"]["command"]


@pytest.mark.usefixtures("children")
def test_a_stage_that_no_longer_fits_is_skipped_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "STAGES", [stage("passes", 20), stage("hangs", 100)])
    code, stages = run(monkeypatch, tmp_path / "cpu.json", "--minutes", "0.5")
    assert code == 0
    assert stages["passes"]["status"] == "passed"
    assert stages["hangs"]["status"] == "skipped"
    assert stages["hangs"]["note"].startswith("takes some 100 s")


@pytest.mark.usefixtures("children")
def test_the_minutes_begin_with_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "STAGES", [stage("passes", 20)])
    monkeypatch.setattr(suite, "process_age", lambda: 25.0)
    _, stages = run(monkeypatch, tmp_path / "cpu.json", "--minutes", "0.5")
    assert stages["passes"]["status"] == "skipped"


def test_a_process_knows_its_age():
    code = "from harness import process_age; print(process_age())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=BENCH)
    assert 0.1 <= float(said.stdout) < 600, "importing torch is part of it"


@pytest.mark.usefixtures("children")
def test_the_next_stage_imports_while_one_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "starts_early", lambda device: True)
    started = []
    start, run_stage = suite.start_stage, suite.run_stage
    monkeypatch.setattr(suite, "start_stage", lambda name, *rest: started.append(name) or start(name, *rest))
    seen = {}

    def noted(stage: Stage, *rest: Any) -> Any:
        seen[stage.name] = list(started)
        return run_stage(stage, *rest)

    monkeypatch.setattr(suite, "run_stage", noted)
    _, stages = run(monkeypatch, tmp_path / "cpu.json", "--only", "passes", "raises", "is_wrong")
    assert seen["passes"] == ["passes", "raises"]
    assert started == ["passes", "raises", "is_wrong"]
    assert [one["status"] for one in stages.values()] == ["passed", "error", "failed"]


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--scale", "full"], "--scale tiny"),
        (["--only", "passes", "--skip", "passes"], "leave nothing"),
        (["--rows", "64", "12"], "--rows 12"),
        ([], "--out"),
    ],
)
def test_mistakes_are_told_in_a_line(flags, told, monkeypatch, tmp_path, capsys):
    out = tmp_path / "cpu.json"
    out.write_text(json.dumps({"device": "another", "stages": {}}))
    assert run(monkeypatch, out, *flags)[0] == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_missing_packages_are_told_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "FASTGRPO_NEEDS", ("json", "no_such_package"))
    out = tmp_path / "cpu.json"
    assert run(monkeypatch, out, "--only", "kernels", "rollout") == (2, {})
    assert "missing here: no_such_package." in capsys.readouterr().err
    options = Namespace(device="cpu", scale="tiny", only=["environment", "kernels"], skip=[], rows=[64])
    assert [stage.name for stage in suite.chosen_stages(options)] == ["environment", "kernels"]


def test_a_machine_without_git_or_a_driver_is_measured_too(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert harness.said("nvidia-smi") == ""
    assert harness.commit() == "abc1234"


def test_a_suite_that_is_killed_leaves_the_finished_stages(tmp_path):
    out = tmp_path / "cpu.json"
    flags = [
        "--device",
        "cpu",
        "--scale",
        "smoke",
        "--only",
        "environment",
        "step_plain",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [sys.executable, str(Path(suite.__file__)), *flags], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("environment: passed"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    record = json.loads(out.read_text())
    assert record["bench"] == "suite"
    assert record["stages"]["environment"]["status"] == "passed"
    assert record["stages"]["environment"]["figures"]["flops_per_s"] > 0
    assert record["stages"].get("step_plain", {"status": "running"})["status"] == "running"
