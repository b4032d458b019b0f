"""The demo: a tiny base Qwen2-VL learns spatial questions from the reward alone, in minutes, on a CPU."""

from pathlib import Path
from typing import Any

DEMO_STEPS = 150


def run_demo(output_dir: Path, *, seed: int, steps: int = DEMO_STEPS) -> dict[str, Any]:
    raise NotImplementedError
