"""Which kernels a step runs, how often and how long: prefill, 16 decode steps in the midst of a rollout, an update."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from fastgrpo_profiling.span import listen
from harness import Result, print_table
from step_setup import SIZES, prepared, training_flags
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastgrpo.cli.arguments import parse
from fastgrpo.profile.opponents import OURS
from fastgrpo.profile.sides.start import build_trainer
from stages import Task, costs_only

LARGEST, NAME_LENGTH = 40, 120
"""How many kernels of each part are written down, and how much of their names."""
STEPS = 2
"""The first compiles what there is to compile."""
DECODES_BEFORE = 10
"""Looks of the host at a rollout before those decode steps that are profiled: 16 steps each on a GPU, 1 on a CPU."""


class PartProfiler:
    """Listens to spans and profiles a part of the second step.

    The part begins where the `number`-th span of the name `begins` does, and ends where the next one named `ends` does.
    """

    def __init__(self, begins: str, ends: str, number: int, device: str) -> None:
        self.begins, self.ends, self.number, self.device = begins, ends, number, device
        self.kernels: list[dict[str, Any]] = []
        """Name, count and ms, largest first."""
        self.fault = "never began"
        self._steps = self._seen = 0
        self._profile: profile | None = None

    def enter(self, name: str) -> None:
        self._steps += name == "update/optimizer"
        try:
            if self._profile is not None and name == self.ends:
                self._end()
            elif self._steps == STEPS - 1 and name == self.begins:
                self._seen += 1
                if self._seen == self.number:
                    self._begin()
        except Exception as error:  # a profiler's fault is not the step's
            self._profile, self.fault = None, f"{type(error).__name__}: {error}"[:300]

    def exit(self) -> None:
        pass

    def _begin(self) -> None:
        self._wait()
        self.fault = "never ended"
        activity = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity])
        self._profile.start()

    def _end(self) -> None:
        assert self._profile is not None
        self._wait()
        ended, self._profile = self._profile, None
        ended.stop()
        self.kernels, self.fault = kernel_table(ended.events() or (), self.device), ""

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def kernel_table(events: Sequence[Any], device: str) -> list[dict[str, Any]]:
    """Each kernel on the device, or on a CPU each operator without those nested in it, largest first."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        if device != "cuda":
            microseconds = event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            microseconds = event.time_range.elapsed_us()
        else:
            continue
        count, ms = found.get(event.name, (0, 0.0))
        found[event.name] = count + 1, ms + microseconds / 1e3
    rows = [{"name": name[:NAME_LENGTH], "count": count, "ms": ms} for name, (count, ms) in found.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def run(task: Task) -> Iterator[Result]:
    """Profiles these parts of one step, which so is not timed."""
    result, size = Result("step_kernels", task.device), SIZES[task.scale]
    parts = {
        "prefill": PartProfiler("rollout/prefill", "rollout/arrange", 1, task.device),
        "decode, 16 steps": PartProfiler(
            "rollout/decode", "rollout/check", min(DECODES_BEFORE, size.tokens // 2), task.device
        ),
        "update": PartProfiler("update/pack", "update/metrics", 1, task.device),
    }
    with prepared(size, task.device) as folder, costs_only(result, "step"):
        flags = [*training_flags(folder, STEPS), "--output_dir", str(folder / "out")]
        trainer = build_trainer(OURS, *parse(flags))
        with ExitStack() as stack:
            for part in parts.values():
                stack.enter_context(listen(part))
            trainer.train()
    for name, part in parts.items():
        result.checks[f"{name}: profiled"] = not part.fault
        if part.fault:
            result.figures[name] = {"fault": part.fault}
            continue
        largest, total = part.kernels[:LARGEST], sum(row["ms"] for row in part.kernels)
        launches = sum(row["count"] for row in part.kernels)
        result.figures[name] = {"ms": total, "launches": launches, "largest": largest}
        rows = [[row["name"][:70], row["count"], row["ms"], f"{row['ms'] / total:.0%}"] for row in largest[:15]]
        print_table(f"{name}: {total:.1f} ms in {launches} kernels", ["kernel", "count", "ms", "share"], rows)
    yield result
