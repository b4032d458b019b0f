"""What a run was made with: kept in its summary, so that its page can say so wherever it is drawn."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def environment(*, use_cpu: bool) -> dict[str, str]:
    """Date, commit, hardware and versions by name; what cannot be known is left out."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "hardware": _hardware(use_cpu),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "fastgrpo": _version("fastgrpo"),
    }
    return {name: value for name, value in found.items() if value}


def _hardware(use_cpu: bool) -> str:
    if torch.cuda.is_available() and not use_cpu:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return f"{ranks} × {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"


def _commit() -> str:
    """Of the checkout this package lies in, with a "+" where files were changed; "" for an installed package."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
