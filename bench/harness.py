"""What every runner in this folder shares: its flags, its table, and the JSON line it ends with."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl", "deepspeed", "flash-attn")


@dataclass
class Result:
    """What a runner found. Ratios are ours over theirs, said so that larger is better for us."""

    bench: str
    device: str
    checks: dict[str, Any] = field(default_factory=dict)
    """Name to True or False, or to the figure a check compared; a False fails the run."""
    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(value is not False for value in self.checks.values())

    def finish(self, out: str | None = None) -> int:
        """Prints the JSON line, last, writes it to `out` too, and returns the exit code."""
        record = {
            "bench": self.bench,
            "device": device_name(self.device),
            "date": now(),
            "commit": commit(),
            "command": command(),
            "versions": versions(),
            "checks_passed": self.passed,
            "checks": self.checks,
            "ratios": self.ratios,
            "figures": self.figures,
        }
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record), flush=True)
        return 0 if self.passed else 1


def parser(description: str) -> argparse.ArgumentParser:
    """The flags every runner takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--out", metavar="FILE", help="also write the JSON record here")
    return arguments


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people; floats with three digits."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def compute_dtype(device: str) -> torch.dtype:
    """What the benchmarks compute in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def process_age() -> float:
    """Seconds since this process was started, the imports before the first line of ours included; 0 without /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        booted = time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd of all: starttime
    except (OSError, AttributeError):
        return 0.0


def device_name(device: str) -> str:
    """The GPU's name, or the processor's and how many threads torch uses of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    model = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return f"cpu: {model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def said(*arguments: str) -> str:
    """What a program prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def now() -> str:
    """The date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command() -> str:
    """The command line of this process."""
    return " ".join(["python", *sys.argv])


def commit() -> str:
    """Of the working tree, with + where files other than results differ from it; of a tree without git, GIT_COMMIT."""
    git = ("git", "-C", str(Path(__file__).parent))
    head = said(*git, "rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("GIT_COMMIT", "unknown")
    return head + ("+" if said(*git, "status", "--porcelain", "--", ":/", ":(exclude)results") else "")
