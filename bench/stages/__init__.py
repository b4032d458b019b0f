"""The stages of `suite.py`, in order of what their figures are worth: a lease may end at any time.

A stage is a generator `run(task)` that yields its `Result` after each part, each time with all found so far: a stage
that is killed leaves the parts before. It checks first, and times nothing that is wrong; the step alone is timed first.

Scales: full is for a GPU, with Qwen2-VL-2B's sizes; tiny runs the same code in some minutes on two CPU cores; smoke is
for tests.
"""

import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harness import Result


@dataclass(frozen=True)
class Task:
    """What a stage is asked for."""

    scale: str
    device: str
    rows: tuple[int, ...] = (64, 256)
    """Completions that the rollout stage draws at once, at full scale; a multiple of 8 each."""


Run = Callable[[Task], Iterator[Result]]


class NotHereError(Exception):
    """A stage cannot run on this machine; the message says what is missing."""


@contextmanager
def costs_only(result: Result, part: str) -> Iterator[None]:
    """Whatever fails in the block is that part's failure alone: a check that did not pass, and the reason."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        result.checks[f"{part} ran"] = False
        result.figures[f"{part}: error"] = f"{type(error).__name__}: {error}".strip()[-600:]


@dataclass(frozen=True)
class Stage:
    """One entry of the table."""

    name: str
    what: str
    h100: int
    """Seconds expected on an H100, start and compilation included."""
    h200: int
    gigabytes: int
    """Of the GPU's memory, expected at full scale."""
    tiny: int
    """Seconds expected on two CPU cores."""
    module: str = ""
    """Of this package; by default the stage's name."""

    def expected_seconds(self, scale: str, device_name: str) -> int:
        """On a card that is in no column: an H100's."""
        if scale != "full":
            return self.tiny
        return self.h200 if "H200" in device_name else self.h100

    def load(self) -> Run:
        """Imported in the stage's own process only, so that whatever it lacks fails that stage alone."""
        module, _, function = (self.module or self.name).partition(":")
        run: Run = getattr(importlib.import_module(f"stages.{module}"), function or "run")
        return run


STAGES = (
    Stage("environment", "machine, versions, a large matrix product and a large copy", 8, 8, 3, 8),
    Stage("kernels", "every op against float64, no timing", 45, 45, 5, 10, "ops:kernels"),
    Stage("step", "the paper's step, ours, as auto takes it and checkpointed", 190, 190, 86, 40),
    Stage("sync", "weights from the policy to the sampler", 15, 15, 10, 12),
    Stage("decode_ops", "attention, rotation and sampling of a decode step, kernel time", 30, 30, 8, 8, "ops:decode"),
    Stage("head", "LM head and loss, forward and backward", 45, 45, 32, 12, "ops:head"),
    Stage("step_kernels", "which kernels an update and 16 decode steps run", 75, 70, 60, 30),
    Stage("rollout", "rollouts against HF generate, by batch size", 70, 65, 35, 15),
    Stage("update", "forward and backward against the padded batch", 60, 55, 65, 20),
    Stage("memory", "peaks of head, rollout and update", 50, 50, 65, 20),
    Stage("step_plain", "the paper's step against plain torch", 260, 240, 70, 40, "compare:against_plain"),
    Stage("step_trl", "the same, against TRL", 480, 450, 70, 60, "compare:against_trl"),
)
"""Measured: head, decode_ops and step on an H100, environment and step on an H200; for step_trl, 280 s did not suffice
on an H100. The rest are guesses."""


def table() -> str:
    """For `--help`."""
    lines = [f"  {'stage':13} {'H100 s':>7} {'H200 s':>7} {'GB':>4} {'tiny s':>7}  what"]
    lines += [f"  {s.name:13} {s.h100:7} {s.h200:7} {s.gigabytes:4} {s.tiny:7}  {s.what}" for s in STAGES]
    return "\n".join(lines)
