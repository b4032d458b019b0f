"""The demo: a tiny base Qwen2-VL learns spatial questions from the reward alone, in minutes, on a CPU."""

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.console import program, say
from fastgrpo.cli.options import require_writable
from fastgrpo.cli.train import run_training
from fastgrpo.data.loading import load_rows
from fastgrpo.demo.base_model import BASE_MODEL_PATH
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_cvbench_parquet, write_sat_parquet
from fastgrpo.safe_text.terminal import Terminal

SETTINGS = Path(__file__).parent / "demo.yaml"
DEMO_STEPS = 200
QUESTIONS = 400
"""Held-out questions, the same for every seed."""
HELD_OUT_SEED = 2026


def run_demo(output_dir: Path, *, seed: int, steps: int = DEMO_STEPS, questions: int = QUESTIONS) -> dict[str, Any]:
    """Renders the data, trains, scores before and after, and prints what came of it. Returns summary.json's figures."""
    require_writable(output_dir)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = output_dir / "data"
    data.mkdir(exist_ok=True)
    train, held_out = data / "sat.parquet", data / "cvbench.parquet"
    write_sat_parquet(train, 8 * steps, seed, kinds=DEMO_KINDS)
    write_cvbench_parquet(held_out, questions, HELD_OUT_SEED, kinds=DEMO_KINDS)
    flags = {
        "config": SETTINGS,
        "model_name_or_path": BASE_MODEL_PATH,
        "dataset_name": train,
        "eval_dataset_name": held_out,
        "output_dir": output_dir,
        "seed": seed,
        "max_steps": steps,
    }
    summary = run_training(*parse([token for name, value in flags.items() for token in (f"--{name}", str(value))]))
    _print(summary)
    say(f"ask it: {shlex.join([*program().split(), 'generate', str(output_dir), *example(held_out, data)])}")
    return summary


def example(held_out: Path, folder: Path) -> list[str]:
    """A held-out question with its picture, which is written into `folder`, as flags of `fastgrpo generate`."""
    rows = load_rows(str(held_out), max_samples=1)
    row = rows.convert(*rows[0])
    picture = folder / "example.png"
    row.images[0].save(picture)
    return ["--image", str(picture), " ".join(str(row.question).split())]


def _print(summary: dict[str, Any]) -> None:
    table = Table("held-out questions", "before", "after", title=f"{summary['steps']} steps, {summary['wall_s']:.0f} s")
    rows = {
        "accuracy": "accuracy",
        "accuracy by the reward's grader": "accuracy_strict",
        "no option readable": "unreadable_rate",
        "answered in the form": "answered_rate",
        "accuracy of those": "answered_accuracy",
        "reflective responses": "reflection_rate",
    }
    for label, name in rows.items():
        table.add_row(label, *(_percent(summary[f"{name}_{when}"]) for when in ("before", "after")))
    table.add_row("response length", *(f"{summary[f'mean_length_{when}']:.1f}" for when in ("before", "after")))
    table.add_row("chance", _percent(summary["chance"]), _percent(summary["chance"]))
    table.add_row("accuracy, pictures shuffled", "", _percent(summary["answered_accuracy_shuffled_images"]))
    table.add_row("pass@8", _percent(summary["pass_at_8_before"]), "")
    Terminal(stderr=True).print(table)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
