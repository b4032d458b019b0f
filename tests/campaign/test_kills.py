"""Runs that are killed at random instants and resumed end as the run that nobody killed, to the last bit.

`make test` kills a few; `make campaign` more than two hundred, over all configurations.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaign import LAST, RESULTS, Runs, content, report

KILLED_RUNS = int(os.environ.get("CAMPAIGN_KILLS", "180")) if RESULTS else 2
STEPS = 6
CONFIGURATIONS = {
    "base": [],
    "reference": ["--beta", "0.04"],
    "moving reference": ["--beta", "0.04", "--sync_ref_model", "true", "--ref_model_sync_steps", "2"],
    "adapters": ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0.1"],
    "used twice": ["--num_iterations", "2"],
    "slices": ["--steps_per_generation", "2", "--per_device_train_batch_size", "4"],
    "accumulated": ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"],
    "one checkpoint kept": ["--save_total_limit", "1"],
    "seldom saved": ["--save_steps", "3"],
    "plain": ["--engine", "plain"],
    "entropy bonus": ["--entropy_coef", "0.01", "--use_adaptive_entropy", "true"],
    "cosine": ["--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--dataloader_num_workers", "1"],
}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Killer:
    """Kills its own process before it touches files of a run for the n-th time, counted from `first` on."""

    def __init__(self, folder: Path, number: int, first: str = "") -> None:
        self.folder, self.left, self.first = str(folder), number, first

    def __call__(self) -> None:
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        if self.first in str(arguments[0]):
            self.first = ""
        self.left -= not self.first
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Chain:
    """One run, killed at several instants."""

    def __init__(self, runs: Runs, name: str, draws: random.Random, seconds: float, earlier: Path) -> None:
        self.runs, self.name, self.draws, self.seconds, self.earlier = runs, name, draws, seconds, earlier
        self.out = runs.folder / name
        self.log = runs.folder / f"{name}.txt"

    def kill(self, *flags: str, after: float, when: Callable[[], bool], before: Callable[[], object]) -> bool:
        """Kills a run `after` seconds of `when`, unless `before` sees to that, or it ends; whether it was killed."""
        with self.log.open("a") as log:
            pid = self.runs.start(self.name, log.fileno(), *flags, before=before)
        begun: float | None = None
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if begun is None and when():
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= after:
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
                break
            time.sleep(0.0005)
        return os.waitstatus_to_exitcode(ended[1]) == -signal.SIGKILL

    def kill_somewhere(self) -> str:
        """Kills a run that resumes; what it was at, or nothing where it ended before."""
        kind = self.draws.random()
        if kind < 0.35:  # while a checkpoint is written, one of the next three
            saving, step = (
                self.out / ".saving",
                min(max(numbers(self.out), default=0) + self.draws.randint(1, 3), STEPS),
            )
            after, when = self.draws.uniform(0, 0.05), lambda: max(numbers(saving), default=0) >= step
            killed = self.kill(*LAST, after=after, when=when, before=int)
        elif kind < 0.65:  # at a file: logs, locks, saves, what a resume cuts
            killer = Killer(self.out, self.draws.randint(1, 250))
            killed = self.kill(*LAST, after=1e9, when=lambda: True, before=killer)
        else:
            killed = self.kill(*LAST, after=self.draws.uniform(0, self.seconds), when=lambda: True, before=int)
        if not killed:
            return ""
        if (self.out / ".moving.json").exists():
            return "move"
        if any((self.out / ".saving").glob("*")):
            return "save"
        return "steps or logs" if (self.out / "metrics.jsonl").exists() else "start"

    def kill_while_moving(self) -> str:
        """Kills a new run that moves an earlier one's files aside, once that has begun."""
        shutil.copytree(self.earlier, self.out)
        while not (self.out / ".moving.json").exists() and not (self.out / "previous-1").exists():
            killer = Killer(self.out, self.draws.randint(2, 30), first=".moving.json")
            self.kill(after=1e9, when=lambda: True, before=killer)
        return "move" if (self.out / ".moving.json").exists() else "start"


def numbers(folder: Path) -> list[int]:
    """Of its checkpoints; a run may take the folder away meanwhile."""
    try:
        return [int(name.removeprefix("checkpoint-")) for name in os.listdir(folder) if name.startswith("checkpoint-")]
    except FileNotFoundError:
        return []


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", list(CONFIGURATIONS)[: None if RESULTS else 1])
def test_killed_runs_go_on_to_the_same_bits(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    draws = random.Random(f"{os.environ.get('CAMPAIGN_SEED', '0')} {name}")
    settings = ["--max_steps", str(STEPS), *CONFIGURATIONS[name]]
    runs = Runs(tmp_path / "runs", tiny_model_dir, sat_file, *settings, draws=False)
    earlier = runs.succeed("earlier", "--seed", "7", "--max_steps", "3")
    start = time.monotonic()
    whole = runs.succeed("whole")
    seconds = time.monotonic() - start
    expected, kept = content(whole), files_of(earlier)
    found: Counter[str] = Counter()
    for run in range(KILLED_RUNS // len(CONFIGURATIONS) if RESULTS else KILLED_RUNS):
        chain = Chain(runs, f"killed-{run}", draws, seconds, earlier)
        moves = run % 4 == 1
        places = [chain.kill_while_moving()] if moves else []
        going_on = 0
        for _ in range((draws.choice([2, 3, 3]) if RESULTS else 1) - moves):
            if place := chain.kill_somewhere():
                places.append(place)
                going_on += place != "move" and bool(numbers(chain.out))
        code, said = runs.finish(chain.name, *LAST)
        assert code == 0, f"{name}, {chain.name}: {chain.log.read_text() if chain.log.exists() else ''}{said}"
        assert content(chain.out) == expected, f"{name}, {chain.name}"
        if moves:
            assert kept.items() <= files_of(chain.out / "previous-1").items(), "nothing of the earlier run is lost"
        found.update({"identical runs": 1, "kills": len(places), "gone on from a checkpoint": going_on})
        found.update(places)
        shutil.rmtree(chain.out)
    report(capsys, "kills", {name: dict(found)}, total=lambda rows: sum(map(Counter, rows.values()), Counter()))
