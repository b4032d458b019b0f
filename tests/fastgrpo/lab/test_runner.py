"""A small lab from start to end: killed, continued, with an arm that fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import metrics_of

from fastgrpo.cli.main import main
from fastgrpo.lab.config import read_lab
from fastgrpo.lab.runner import run_lab
from fastgrpo.lab.runs import runs_of
from fastgrpo.training.run_lock import RunLock

TIMED = ("step_time", "tokens_per_second", "mfu")


def untimed(folder: Path) -> list[dict[str, object]]:
    """A run's step log without what differs from time to time."""
    return [
        {name: value for name, value in line.items() if name not in TIMED and not name.startswith(("time/", "share/"))}
        for line in metrics_of(folder)
    ]


def first_line_of(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Returns when `file` holds a line."""
    while not (file.is_file() and b"\n" in file.read_bytes()):
        assert process.poll() is None, "the lab ended early"


def test_a_lab_that_was_killed_goes_on_and_an_arm_that_fails_stops_no_other(lab_file, tmp_path, capsys):
    arms = {"rl": {}, "control": {"settings": {"reward_funcs": ["format"]}}}
    broken = {"settings": {"model_name_or_path": "no/such-model"}}
    file, lab = lab_file(arms={**arms, "broken": broken}, seeds=[0, 1]), tmp_path / "lab"
    command = [sys.executable, "-m", "fastgrpo", "lab", str(file), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first_line_of(lab / "rl" / "seed-0" / "metrics.jsonl", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with RunLock(lab).held():
        pass  # the dead lab holds nothing

    assert main(["lab", str(file), "--jobs", "2"]) == 2

    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "fastgrpo lab: error: failed: broken seed 0, broken seed 1. The same command tries these again."
    )
    failure = next(line for line in said if line.startswith("broken seed 1: failed in train (exit code 2): "))
    assert "no/such-model" in failure
    assert (lab / "report.html").is_file()
    assert main(["train", *_flags_of(lab / "rl" / "seed-1", seed=1), "--output_dir", str(tmp_path / "alone")]) == 0
    assert untimed(lab / "rl" / "seed-1") == untimed(tmp_path / "alone")
    for name in ("rl/seed-0", "control/seed-0", "control/seed-1"):
        assert [line["step"] for line in metrics_of(lab / name)] == [1, 2, 3]
        assert (lab / name / "summary.json").is_file()
    logs = {path: path.read_bytes() for path in lab.glob("*/seed-*/log.txt")}
    assert main(["lab", str(lab_file(arms=arms, seeds=[0, 1]))]) == 0
    assert logs == {path: path.read_bytes() for path in logs}, "what is done is left as it is"


def _flags_of(folder: Path, seed: int) -> list[str]:
    """The settings a run's log begins with."""
    words = (folder / "log.txt").read_text().splitlines()[0].split()
    flags = words[words.index("train") + 1 : words.index("--output_dir")]
    return [*flags, "--seed", str(seed)]


def test_a_run_with_other_settings_is_not_taken_for_the_same(lab_file, tmp_path):
    lab = read_lab(lab_file())
    folder = tmp_path / "lab" / "rl" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "lab_settings.json").write_text('{"command": "train", "max_steps": 4}')
    with pytest.raises(ValueError, match=r"rl/seed-0 holds a run with max_steps=4; the lab's file now says 3"):
        run_lab(lab)


def test_what_prepares_a_lab_runs_once_and_stops_it_where_it_fails(lab_file, tmp_path):
    done = tmp_path / "lab" / "rl" / "seed-0" / "summary.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")  # nothing is left to train
    lab = read_lab(lab_file(prepare=["zipfile --list no.zip"]))
    with pytest.raises(ValueError, match=r"prepare: 'zipfile --list no.zip' failed \(exit code 1\)"):
        run_lab(lab)
    lab = read_lab(lab_file(prepare=["this"]))
    assert run_lab(lab) == []
    assert run_lab(lab) == []
    assert (tmp_path / "lab" / "prepare.log").read_text().count("The Zen of Python") == 1


def test_a_second_lab_in_the_folder_is_refused(lab_file, tmp_path):
    lab = read_lab(lab_file())
    with RunLock(tmp_path / "lab").held(), pytest.raises(ValueError, match=r"lab' is in use by process"):
        run_lab(lab)


def test_evaluations_are_made_before_and_after_of_the_first_seed_and_after_of_the_others(lab_file, tmp_path):
    lab = read_lab(
        lab_file(
            seeds=[0, 1],
            evaluations={"moss": {"benchmark": "mossbench", "max_samples": 5}},
            arms={"rl": {"settings": {"prompt_mode": "base"}, "evaluations": ["moss"]}},
        )
    )
    first, second = runs_of(lab)
    assert [stage.name for stage in first.stages] == ["moss before", "train", "moss after"]
    assert [stage.name for stage in second.stages] == ["train", "moss after"]
    before, _, after = first.stages
    folder = tmp_path / "lab" / "rl" / "seed-0"
    asked = ["--prompt_mode", "base", "--benchmark", "mossbench", "--max_samples", "5", "--output_dir"]
    assert before.arguments == ["eval", lab.arms[0].settings["model_name_or_path"], *asked, f"{before.marker.parent}"]
    assert after.arguments[:2] == ["eval", str(folder)]
    after.marker.parent.mkdir(parents=True)
    after.marker.write_text(json.dumps(after.arguments))
    assert after.is_done()
    after.marker.write_text(json.dumps([*after.arguments, "--seed", "1"]))
    assert not after.is_done(), "another evaluation"
