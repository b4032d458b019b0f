"""The `fastgrpo` command: train, eval, profile, report, demo, doctor."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fastgrpo import __version__
from fastgrpo.cli.arguments import parse
from fastgrpo.cli.doctor import examine
from fastgrpo.cli.eval import run_eval
from fastgrpo.cli.options import Parser, at_least
from fastgrpo.cli.train import run_training
from fastgrpo.demo.run import DEMO_STEPS, run_demo
from fastgrpo.profile.run import ProfileOptions, run_profile
from fastgrpo.profile.sides import OPPONENTS
from fastgrpo.report import write_report

USAGE = """usage: fastgrpo COMMAND …

  train    train a model with GRPO            fastgrpo train --help lists the flags
  eval     score a model on CV-Bench or SAT   fastgrpo eval MODEL DATASET
  profile  time a training step against another implementation, and show where the time went
  report   draw a run's report, or several    fastgrpo report RUN…
  demo     train a tiny model on this machine fastgrpo demo
  doctor   what is installed, and what each missing part costs

FASTGRPO_TRACEBACK=1 shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):
        arguments.pop(0)  # from DeepSpeed's launcher, which also sets it in the environment
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastgrpo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"fastgrpo: unknown command {name!r}: use {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _quieten()
    try:
        COMMANDS[name](rest)
    except ValueError as error:
        if os.environ.get("FASTGRPO_TRACEBACK"):
            raise
        print(f"fastgrpo {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastgrpo {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _quieten() -> None:
    """Switches off what libraries print that tells a user nothing. Downloads keep their bars."""
    had_download_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # of loading and writing weights; the hub's go with them
    if had_download_bars:
        enable_progress_bars()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # A model's own generation settings, often at odds with each other, are not used here.
    logging.get_logger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    # That settings of today get another name in transformers 6.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find that out


def _train(argv: Sequence[str]) -> None:
    run_training(*parse(argv))


def _profile(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="fastgrpo profile",
        description="Whole training steps against another implementation, taking turns. Further flags are fastgrpo "
        "train's and override the config's; a config without a model or data gets the demo's.",
    )
    parser.add_argument("config", type=Path, help="settings of `fastgrpo train` (YAML)")
    parser.add_argument("--against", choices=tuple(OPPONENTS), default="plain", help=_listed(OPPONENTS))
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=at_least(0), default=1, help="steps of each side before them")
    parser.add_argument("--scale", action="store_true", help="again with half the completions: how each phase grows")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/profile"))
    parser.add_argument("--trl_python", type=Path, default=Path(".venv-bench/bin/python"))
    options, flags = parser.parse_known_args(argv)
    run_profile(ProfileOptions(**vars(options), flags=flags))


def _listed(choices: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())


def _report(argv: Sequence[str]) -> None:
    parser = Parser(prog="fastgrpo report", description="One page for a run; curves with error bars for several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument("--out", type=Path, help="the page's file")
    options = parser.parse_args(argv)
    print(write_report(options.runs, options.out))


def _demo(argv: Sequence[str]) -> None:
    parser = Parser(prog="fastgrpo demo", description="Trains a tiny Qwen2-VL on spatial questions, on a CPU.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=at_least(1), default=DEMO_STEPS)
    options = parser.parse_args(argv)
    run_demo(options.output_dir, seed=options.seed, steps=options.steps)


def _doctor(argv: Sequence[str]) -> None:
    Parser(prog="fastgrpo doctor", description="What is installed, and what each missing part costs.").parse_args(argv)
    table = Table("part", "found", "what follows")
    for finding in examine():
        table.add_row(finding.part, finding.found, finding.consequence)
    Console().print(table)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": run_eval,
    "profile": _profile,
    "report": _report,
    "demo": _demo,
    "doctor": _doctor,
}
