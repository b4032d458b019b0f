"""Makes a lab's runs: programs side by side, those that are done left out, those that fail reported."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fastgrpo.atomic_files import write_aside
from fastgrpo.cli.console import console, say
from fastgrpo.lab.config import Lab
from fastgrpo.lab.runs import LabRun, Stage, runs_of
from fastgrpo.report.arms import LAB_FILE
from fastgrpo.training.run_lock import RunLock

POLL_S = 0.5


def run_lab(lab: Lab, jobs: int | None = None) -> list[LabRun]:
    """Makes all runs that are not done; returns those that failed.

    Args:
        jobs: programs at a time; None for one per GPU, or one without a GPU.

    Raises:
        ValueError: another lab works in the folder, a run there has other settings, more jobs than GPUs, or what
            prepares the lab failed.
    """
    runs = runs_of(lab)
    for run in runs:
        run.check_settings()
    gpus = [] if all(arm.settings.get("use_cpu") for arm in lab.arms) else visible_gpus()
    if gpus and (jobs or 0) > len(gpus):
        raise ValueError(f"--jobs {jobs}: there are {len(gpus)} GPUs, and each takes one run at a time.")
    jobs = jobs or len(gpus) or 1
    places = [_environment(gpus[i] if gpus else None, jobs) for i in range(jobs)]
    with RunLock(lab.output_dir).held():
        text = json.dumps(asdict(lab), indent=2, default=str) + "\n"
        write_aside(lab.output_dir / LAB_FILE, lambda path: path.write_text(text))
        _prepare(lab)
        return _Work(runs, places).finish()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one each."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


def _environment(gpu: str | None, jobs: int) -> dict[str, str]:
    """Of a program: a GPU of its own, or its share of the cores."""
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    return environment


def _prepare(lab: Lab) -> None:
    done = lab.output_dir / "prepared.json"
    if not lab.prepare or (done.is_file() and json.loads(done.read_text()) == list(lab.prepare)):
        return
    log = lab.output_dir / "prepare.log"
    for line in lab.prepare:
        say(f"preparing: {line}")
        process = _start([sys.executable, "-m", *shlex.split(line)], log, dict(os.environ))
        _wait([process])
        if process.returncode:
            raise ValueError(f"prepare: {line!r} failed ({_ending(process.returncode)}); log: {log}")
    write_aside(done, lambda path: path.write_text(json.dumps(lab.prepare)))


def _start(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        child = [sys.executable, "-m", "fastgrpo.lab.child", str(os.getpid()), *command]
        return subprocess.Popen(child, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended; they got an interrupt from the terminal too."""
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.terminate()
        raise


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class _Work:
    """Runs waiting, running and failed.

    Args:
        places: the environment of each program that may run beside the others.
    """

    def __init__(self, runs: Sequence[LabRun], places: Sequence[dict[str, str]]) -> None:
        self.all = runs
        self.waiting = [run for run in runs if not run.is_done]
        self.places: list[dict[str, str]] = list(places)
        self.running: list[_Running] = []
        self.failed: list[LabRun] = []

    def finish(self) -> list[LabRun]:
        done = len(self.all) - len(self.waiting)
        say(f"lab: {len(self.all)} runs, {done} done already, {len(self.places)} at a time")
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        progress = Progress(*columns, console=console, disable=not console.is_terminal)
        total = progress.add_task("runs", total=len(self.all), completed=done)
        with progress if console.is_terminal else nullcontext():
            try:
                while self.waiting or self.running:
                    while self.waiting and self.places:
                        self._begin(progress)
                    time.sleep(POLL_S)
                    for running in list(self.running):
                        if running.ended():
                            self._end(running, progress)
                    progress.update(total, completed=len(self.all) - len(self.waiting) - len(self.running))
            except BaseException:
                for running in self.running:
                    running.process.terminate()
                _wait([running.process for running in self.running])
                raise
        return self.failed

    def _begin(self, progress: Progress) -> None:
        run, environment = self.waiting.pop(0), self.places.pop(0)
        run.keep_settings()
        task = progress.add_task(run.name, total=run.max_steps)
        say(f"{run.name}: {'goes on at step ' + str(run.step()) if run.step() else 'starts'}")
        self.running.append(_Running(run, environment, lambda step: progress.update(task, completed=step), task))

    def _end(self, running: "_Running", progress: Progress) -> None:
        self.running.remove(running)
        self.places.append(running.environment)
        progress.remove_task(running.task)
        run, code = running.run, running.process.returncode
        if code:
            self.failed.append(run)
            say(f"{run.name}: failed in {running.stage.name} ({_ending(code)}): {run.last_line()} (log: {run.log})")
        else:
            say(f"{run.name}: done in {time.monotonic() - running.start:.0f} s")


class _Running:
    """A run under way: one stage after the other."""

    def __init__(
        self, run: LabRun, environment: dict[str, str], show_step: Callable[[int], None], task: TaskID
    ) -> None:
        self.run, self.environment, self.show_step, self.task = run, environment, show_step, task
        self.start = time.monotonic()
        self.left = [stage for stage in run.stages if not stage.is_done()]
        self._next()

    def _next(self) -> None:
        self.stage: Stage = self.left.pop(0)
        command = [sys.executable, "-m", "fastgrpo", *self.stage.arguments]
        self.process = _start(command, self.run.log, self.environment)

    def ended(self) -> bool:
        """Whether its last stage has ended, or one has failed; starts the next stage where there is one."""
        self.show_step(self.run.step())
        code = self.process.poll()
        if code is None:
            return False
        if code == 0 and self.stage.marker is not None:
            self.stage.marker.parent.mkdir(parents=True, exist_ok=True)
            self.stage.marker.write_text(json.dumps(self.stage.arguments))
        if code or not self.left:
            return True
        self._next()
        return False
