"""Every figure of the kernels, the sampler, the update and the whole step, in one command under a time budget.

    python bench/suite.py --minutes 8                      # on a machine with a GPU
    python bench/suite.py --device cpu --scale tiny        # the same stages, small, on two CPU cores

Each stage (`stages/`) runs in a process of its own, so one that fails, hangs or breaks its device takes no other with
it. The results file is written anew, aside and renamed, after each part of a stage: whatever ends the suite, what was
found is there. A stage whose expected time no longer fits is skipped and says so; run it later with `--only` and the
same `--out`, which keeps the other stages' results.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from fastgrpo_profiling.worker import claim_stdout
from harness import Result, command, commit, device_name, now, parser, print_table, process_age, versions
from stages import STAGES, NotHereError, Stage, Task, table

RESULTS = Path(__file__).parent / "results"
SLACK = 3.0
"""How many times its expected time a stage may take, where time is left."""
LEAST_LIMIT = 120.0
"""Seconds that any stage may take, where time is left."""
KERNELS_ALONE = ("environment", "kernels", "head", "decode_ops")
"""Stages that import nothing of `fastgrpo`."""
FASTGRPO_NEEDS = ("accelerate", "jinja2", "matplotlib", "peft", "PIL", "pyarrow", "xxhash")
"""What `fastgrpo` imports at once and a machine that came with PyTorch and transformers may lack."""


@dataclass
class Record:
    """What became of a stage."""

    status: str
    """passed, failed (a check), error, cut off, skipped; running in the file of a suite that was killed."""
    seconds: float = 0.0
    note: str = ""
    """Why it was skipped, or how it went wrong."""
    checks: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    command: str = ""

    @property
    def is_fault(self) -> bool:
        return self.status not in ("passed", "skipped")

    def take(self, found: dict[str, Any]) -> None:
        """What a stage has yielded, in the place of what it yielded before."""
        self.checks, self.ratios, self.figures = found["checks"], found["ratios"], found["figures"]


class ResultsFile:
    """The JSON file: a header, and a record for each stage. Stages of an earlier run in it stay until run again.

    Raises:
        ValueError: the file there is of another machine, another scale or other versions.
    """

    def __init__(self, path: Path, device: str, scale: str) -> None:
        self.path = path
        self.log = path.with_suffix(".log")
        """What the stages print."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.header = {"bench": "suite", "device": device_name(device), "scale": scale, "versions": versions()}
        self.stages: dict[str, Any] = {}
        if path.exists():
            there = json.loads(path.read_text())
            if any(there.get(name) != value for name, value in self.header.items()):
                raise ValueError(f"--out {path} holds results of another machine, scale or version: name another file.")
            self.stages = there["stages"]

    def put(self, name: str, record: Record) -> None:
        """Writes the file anew."""
        self.stages[name] = asdict(record)
        order = [stage.name for stage in STAGES]
        known = sorted(set(self.stages) & set(order), key=order.index)
        ran = {name: self.stages[name] for name in [*known, *(self.stages.keys() - set(order))]}
        faults = [name for name, one in ran.items() if one["status"] not in ("passed", "skipped")]
        whole = {
            **self.header,
            "date": now(),
            "commit": record.commit,
            "command": record.command,
            "checks_passed": not faults,
            "checks": {
                f"{name}: {check}": value for name, one in ran.items() for check, value in one["checks"].items()
            },
            "ratios": {
                f"{name}: {ratio}": value for name, one in ran.items() for ratio, value in one["ratios"].items()
            },
            "stages": ran,
        }
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(aside, self.path)


def main() -> int:
    began = time.monotonic() - process_age()
    options = _parser().parse_args()
    if options.stage:
        return be_stage(options.stage, Task(options.scale, options.device, tuple(options.rows)))
    try:
        chosen = chosen_stages(options)
        path = Path(options.out) if options.out else default_path(options.device)
        results = ResultsFile(path, options.device, options.scale)
    except ValueError as error:
        print(f"suite: {error}", file=sys.stderr)
        return 2
    deadline = began + 60 * options.minutes
    ran: dict[str, Record] = {}
    process = None
    for stage, following in zip_longest(chosen, chosen[1:]):
        current = process or start_stage(stage.name, options, results.log)
        early = following is not None and starts_early(options.device)
        process = start_stage(following.name, options, results.log) if early else None
        record = ran[stage.name] = run_stage(stage, current, options, deadline, results)
        note = record.note.splitlines()[-1][:200] if record.note else ""
        print(f"{stage.name}: {record.status}, {record.seconds:.0f} s {note}".strip(), flush=True)
    ratios = {f"{name}: {ratio}": round(x, 3) for name, one in ran.items() for ratio, x in one.ratios.items()}
    if ratios:
        rows = [[name, ratio] for name, ratio in ratios.items()]
        print_table("Ours over theirs: larger is better for us", ["measured", "times"], rows)
    result = Result("suite", options.device)
    result.checks = {f"{name} {record.status}": not record.is_fault for name, record in ran.items()}
    result.ratios = ratios
    result.figures = {
        "file": str(results.path),
        "log": str(results.log),
        "seconds": {name: round(one.seconds) for name, one in ran.items()},
    }
    return result.finish()


def starts_early(device: str) -> bool:
    """Whether a stage imports what it needs, many seconds of a GPU's time, while the one before it still runs."""
    return device == "cuda"


def chosen_stages(options: argparse.Namespace) -> list[Stage]:
    """By --only and --skip, in the table's order.

    Raises:
        ValueError: a device that is not there, a scale that cannot run on it, batches that are no whole groups,
            nothing left to run, or packages that are missing: told now rather than by one stage after the other.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; give --device cpu --scale tiny.")
    if options.scale == "full" and options.device == "cpu":
        raise ValueError("--scale full is a 2B model's: give --device cuda, or --scale tiny.")
    if odd := [rows for rows in options.rows if rows < 8 or rows % 8]:
        raise ValueError(f"--rows {odd[0]}: completions come in groups of 8, give a multiple of it.")
    chosen = [s for s in STAGES if (not options.only or s.name in options.only) and s.name not in options.skip]
    if not chosen:
        raise ValueError(f"--only and --skip leave nothing: choose of {', '.join(stage.name for stage in STAGES)}.")
    missing = [name for name in FASTGRPO_NEEDS if importlib.util.find_spec(name) is None]
    if missing and any(stage.name not in KERNELS_ALONE for stage in chosen):
        alone = " ".join(KERNELS_ALONE)
        raise ValueError(f"missing here: {', '.join(missing)}. Install what pyproject.toml lists, or --only {alone}.")
    return chosen


def default_path(device: str) -> Path:
    """bench/results/<device>-<date>.json"""
    name = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{name.removeprefix('nvidia-')}-{now()[:10]}.json"


def run_stage(
    stage: Stage,
    process: "subprocess.Popen[str]",
    options: argparse.Namespace,
    deadline: float,
    results: ResultsFile,
) -> Record:
    """Tells the stage's process to begin, takes down what it yields, and ends it when its time is up."""
    record = Record("running", commit=commit(), command=command())
    left = deadline - time.monotonic()
    expected = stage.expected_seconds(options.scale, results.header["device"])
    with process:
        if left < expected:
            end(process)
            record.status = "skipped"
            record.note = f"takes some {expected} s, {max(left, 0):.0f} s are left"
            if stage.name not in results.stages:
                results.put(stage.name, record)
            return record
        results.put(stage.name, record)
        start, limit = time.monotonic(), min(left, max(LEAST_LIMIT, SLACK * expected))
        printed = results.log.stat().st_size
        timer = threading.Timer(limit, end, [process])
        timer.start()
        try:
            begin(process)
            listen(process, record, lambda: results.put(stage.name, record))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            timer.cancel()
            end(process)  # also what it left running
    record.seconds = time.monotonic() - start
    if record.status == "running":
        with results.log.open(errors="replace") as log:
            log.seek(printed)
            record.status, record.note = verdict(record, process.returncode, record.seconds >= limit, log.read())
    results.put(stage.name, record)
    return record


def begin(process: "subprocess.Popen[str]") -> None:
    """Lets a stage's process, which has imported what it needs, run."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        os.write(process.stdin.fileno(), b"\n")  # past the buffer, which closing would try to write again


def listen(process: "subprocess.Popen[str]", record: Record, found_more: Callable[[], None]) -> None:
    """Takes down what a stage's process says, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # killed while it spoke
        answer = json.loads(line)
        if "skipped" in answer:
            record.status, record.note = "skipped", answer["skipped"]
        else:
            record.take(answer)
            found_more()


def verdict(record: Record, code: int, is_late: bool, said: str) -> tuple[str, str]:
    """Status and note of a stage that has ended; `said` is what it printed."""
    if is_late:
        return "cut off", f"still running after {record.seconds:.0f} s"
    if code != 0:
        return "error", f"exit code {code}: {said.strip()[-1500:]}"
    wrong = [name for name, value in record.checks.items() if value is False]
    return ("failed", f"wrong: {', '.join(wrong)}") if wrong else ("passed", "")


def start_stage(name: str, options: argparse.Namespace, log: Path) -> "subprocess.Popen[str]":
    """A process group of its own, so that whatever it starts ends with it. It imports what it needs, then waits."""
    flags = ["--stage", name, "--device", options.device, "--scale", options.scale]
    flags += ["--rows", *map(str, options.rows)]
    with log.open("a") as printed:
        return subprocess.Popen(
            [sys.executable, __file__, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},  # a machine without a network would wait for one
        )


def end(process: "subprocess.Popen[str]") -> None:
    """Kills a process that nobody has waited for yet, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def be_stage(name: str, task: Task) -> int:
    """In the stage's process: a line of JSON for each yield; all else that is printed goes to standard error."""
    answers = claim_stdout()
    stage = next(stage for stage in STAGES if stage.name == name)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    failure, run = None, None
    try:
        run = stage.load()
    except Exception as error:  # told when it is this stage's turn
        failure = error
    if not os.read(0, 1):
        return 0  # the suite has ended
    if os.getpgrp() == os.getpid():  # as `start_stage` starts it
        threading.Thread(target=_end_with_suite, daemon=True).start()
    try:
        if run is None:
            assert failure is not None
            raise failure
        for result in run(task):
            answer({"checks": result.checks, "ratios": result.ratios, "figures": result.figures})
    except NotHereError as reason:
        answer({"skipped": str(reason)})
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _end_with_suite() -> None:
    """The suite holds the other end of standard input: when it is gone, nobody wants the answer."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _parser() -> argparse.ArgumentParser:
    names = [stage.name for stage in STAGES]
    arguments = parser("Every figure of this project in one command, in stages, under a time budget.")
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.epilog = f"stages, in order, with what they are expected to take at full scale:\n\n{table()}"
    scale = "full" if torch.cuda.is_available() else "tiny"
    arguments.add_argument("--scale", choices=("full", "tiny", "smoke"), default=scale, help="full needs a GPU")
    arguments.add_argument("--minutes", type=float, default=8.0, help="from the start of this process to its end")
    arguments.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help="these alone")
    arguments.add_argument("--skip", nargs="+", choices=names, default=[], metavar="STAGE", help="all but these")
    arguments.add_argument("--rows", nargs="+", type=int, default=[64, 256], help="batches of the rollout stage")
    arguments.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
