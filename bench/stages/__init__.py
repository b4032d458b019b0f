"""The stages of `suite.py`, in order.

A stage is a generator `run(scale, device)` that yields its `Result` after each part, each time with all found so far: a
stage that is killed leaves the parts before. It checks first, and times nothing that is wrong.

Scales: full is for a GPU, with Qwen2-VL-2B's sizes; tiny runs the same code in three minutes on two CPU cores; smoke is
for tests.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness import Result

Run = Callable[[str, str], Iterator[Result]]


class NotHereError(Exception):
    """A stage cannot run on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Stage:
    """One entry of the table."""

    name: str
    what: str
    full_seconds: int
    """Expected on an H200, start and compilation included: guesses, until a suite was run there."""
    tiny_seconds: int
    """Expected on two CPU cores."""
    module: str = ""
    """Of this package; by default the stage's name."""

    def expected_seconds(self, scale: str) -> int:
        return self.full_seconds if scale == "full" else self.tiny_seconds

    def load(self) -> Run:
        """Imported in the stage's own process only, so that whatever it lacks fails that stage alone."""
        module, _, function = (self.module or self.name).partition(":")
        run: Run = getattr(importlib.import_module(f"stages.{module}"), function or "run")
        return run


STAGES = (
    Stage("environment", "machine and versions", 8, 4),
    Stage("ceilings", "a large matrix product and a large copy, here and now", 8, 5),
    Stage("kernels", "every op against float64, no timing", 60, 10),
    Stage("head", "LM head and loss, forward and backward", 30, 12),
    Stage("decode_ops", "attention, rotation and sampling of a decode step", 30, 8),
    Stage("rollout", "rollouts against HF generate, by batch size", 100, 15),
    Stage("update", "forward and backward against the padded batch", 55, 20),
    Stage("sync", "weights from the policy to the sampler", 20, 12),
    Stage("step", "the paper's step, ours", 100, 25),
    Stage("step_plain", "the same, against plain torch", 220, 40, "step:against_plain"),
    Stage("step_trl", "the same, against TRL", 260, 60, "step:against_trl"),
    Stage("memory", "peaks of head, rollout and update", 45, 20),
)
