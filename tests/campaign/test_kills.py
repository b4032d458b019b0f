"""Runs that are killed at random instants and resumed end as the run that nobody killed, to the last bit.

`make test` kills a few; `make campaign` a few hundred, over all configurations.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fastgrpo.cli.main import main

KILLS = int(os.environ.get("CAMPAIGN_KILLS", "6"))
STEPS = 6
REWARDS = """
import hashlib

def varied(completions, **_):
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
"""
BASE = [
    "--max_samples", "6", "--num_generations", "4", "--per_device_train_batch_size", "8", "--max_completion_length",
    "6", "--use_cpu", "--learning_rate", "0.01", "--logging_steps", "2", "--save_steps", "1", "--report_to", "none",
    "--disable_tqdm", "true", "--reward_funcs", "campaign_rewards:varied", "--max_steps", str(STEPS),
    "--resume_from_checkpoint", "last",
]  # fmt: skip
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


class Campaign:
    """Runs of one configuration, each in a fork of this process, which has everything imported."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder = folder
        self.flags = flags
        folder.mkdir()

    def start(self, name: str) -> int:
        """A run into the folder `name`; its process."""
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        try:
            log = os.open(self.folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = main(["train", *self.flags, "--output_dir", str(self.folder / name)])
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
            code = 1
        os._exit(code)

    def finish(self, name: str) -> None:
        _, status = os.waitpid(self.start(name), 0)
        assert status == 0, (self.folder / f"{name}.txt").read_text()

    def kill(self, name: str, after: float, when: Callable[[], bool]) -> str:
        """Kills a run `after` seconds of its beginning, or of `when`; in what it was at work."""
        pid = self.start(name)
        begun: float | None = None
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if begun is None and when():
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= after:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return self.at_work(name)
            time.sleep(0.0005)
        return "had ended"

    def at_work(self, name: str) -> str:
        out = self.folder / name
        if any((out / ".saving").glob("*")):
            return "save"
        if (out / ".moving.json").exists():
            return "move"
        return "steps" if (out / "metrics.jsonl").exists() else "start"


def without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    clocks = ("time/", "share/")
    return {
        name: value
        for name, value in line.items()
        if not name.startswith(clocks) and name not in ("step_time", "tokens_per_second", "mfu")
    }


def content(out: Path) -> dict[str, Any]:
    """What two equal runs have in common: figures of every step, completions, weights."""
    lines = [without_clocks(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    completions = {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "completions").iterdir())}
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    return {"metrics": lines, "completions": completions, "weights": weights}


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "campaign_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "campaign_rewards", raising=False)


def test_killed_runs_go_on_to_the_same_bits(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path, rewards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = random.Random(int(os.environ.get("CAMPAIGN_SEED", "0")))
    chosen = list(CONFIGURATIONS.items())[: 2 if len(CONFIGURATIONS) > KILLS else None]
    table: dict[str, Counter[str]] = {}
    for number, (name, flags) in enumerate(chosen):
        paths = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file)]
        campaign = Campaign(tmp_path / str(number), [*paths, *BASE, *flags])
        start = time.monotonic()
        campaign.finish("whole")
        seconds = time.monotonic() - start
        expected = content(campaign.folder / "whole")
        found: Counter[str] = Counter()
        left = KILLS // len(chosen)
        while left > 0:
            run = f"killed-{left}"
            out = campaign.folder / run
            for _ in range(min(left, draws.randint(1, 3))):
                if draws.random() < 0.4:
                    after, when = draws.uniform(0, 0.05), lambda out=out: any((out / ".saving").glob("checkpoint-*"))
                else:
                    after, when = draws.uniform(0, seconds), lambda: True
                found[campaign.kill(run, after, when)] += 1
                left -= 1
            campaign.finish(run)
            same = content(out) == expected
            found["identical" if same else "different"] += 1
            assert same, f"{name}, {run}"
        table[name] = found
    with capsys.disabled():
        for name, found in table.items():
            print(f"\n{name}: {dict(found)}", end="")
        total: Counter[str] = sum(table.values(), Counter())
        print(f"\n{json.dumps({'campaign': 'kills', 'configurations': len(table), **total})}")
