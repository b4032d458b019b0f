"""The paper's step end to end, on Qwen2-VL-2B's shape with random weights: 8 prompts × 8, exactly 700 new tokens."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastgrpo_profiling.compare import StepRecord
from fastgrpo_profiling.report import Cost, SideFigures, side_figures
from fastgrpo_profiling.roofline import Update, measure_ceilings
from harness import Result, compute_dtype, print_table
from step_setup import SIZES, TRL_PYTHON, StepSize, prepared, training_flags

from fastgrpo.cli.arguments import parse
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OURS, PLAIN
from fastgrpo.profile.run import free_memory
from fastgrpo.profile.sides.start import build_trainer, start_side
from stages import Task, costs_only

GATE_TOKENS = 32
"""New tokens of the completions that both sides are compared on."""


AUTO = "as auto chooses"
"""The step with gradient_checkpointing=auto."""


def run(task: Task) -> Iterator[Result]:
    """Our side alone. The step as `gradient_checkpointing=auto` takes it is timed first: it is a user's, and what
    a short lease is for. Then whether loss, gradients and log-probs are plain torch's; last the step with all layers
    checkpointed. A part that fails costs what it is about."""
    result, size = Result("step", task.device), SIZES[task.scale]
    result.figures["model"] = "Qwen2-VL-2B" if task.scale == "full" else task.scale
    with prepared(size, task.device) as folder:
        flags = training_flags(folder, size.timed + 2)
        if size.is_large:
            with costs_only(result, AUTO):
                memory = torch.cuda.get_device_properties(0).total_memory
                checkpointing = not size.fits_unchecked(memory)
                result.figures[AUTO] = our_figures(as_auto(flags), folder, size, result, checkpointing=checkpointing)
            yield result
        with costs_only(result, "comparison"):
            checked = compare_with_plain(flags, folder, size)
            result.checks["plain torch's step"] = not checked.failures
            result.figures["apart"] = checked.figures
            if checked.failures:
                print("The times above count for nothing:", "; ".join(checked.failures))
        yield result
        with costs_only(result, "step"):
            result.figures |= our_figures(flags, folder, size, result)
        yield result


def our_figures(
    flags: Sequence[str],
    folder: Path,
    size: StepSize,
    result: Result,
    *,
    checkpointing: bool = True,
) -> dict[str, Any]:
    """Times and peak of our side, beside what shapes say the peak should be."""
    (steps,) = timed_steps([OURS], flags, folder, size.timed).values()
    figures = summed_up(steps, size, result.device)
    estimate = size.memory(checkpointing=checkpointing)
    result.checks[f"exactly {size.tokens} tokens each"] = figures.tokens == size.drawn
    rows = [["whole step, s", figures.step_seconds.median], *([f"{name}, s", s] for name, s in figures.phases.items())]
    rows += [["peak, GB", figures.peak_bytes / 1e9], ["… estimated for a GPU", sum(estimate.values()) / 1e9]]
    way = " checkpointed" if checkpointing else ", not checkpointed"
    print_table(f"A step of {size.prompts} × {size.group} × {size.tokens}{way}", ["", "measured"], rows)
    return {**asdict(figures), "estimated_bytes": estimate, "checkpointing": checkpointing}


def as_auto(flags: Sequence[str]) -> list[str]:
    """The flags of a run that leaves checkpointing to us."""
    return [*flags, "--gradient_checkpointing", "auto"]


def compare_with_plain(flags: Sequence[str], folder: Path, size: StepSize) -> gate.Gate:
    """What both sides make of the first prompts, one after the other: two such models do not fit one GPU."""
    short = ["--max_completion_length", str(min(size.tokens, GATE_TOKENS))]
    config, script = parse([*flags, *short, "--output_dir", str(folder / "gate")])
    answer = gate.answer_of(build_trainer(OURS, config, script))
    free_memory()
    checked = gate.compare(answer, build_trainer(PLAIN, config, script), gate.tolerances(config, script.dtype))
    free_memory()
    return checked


def timed_steps(names: Sequence[str], flags: Sequence[str], folder: Path, steps: int) -> dict[str, list[StepRecord]]:
    """Steps of sides that run at the same time, in processes of their own, taking turns; the first of each untimed."""
    with ExitStack() as stack:
        sides = []
        for name in names:
            sides.append(start_side(name, flags, folder, trl_python=TRL_PYTHON))
            stack.callback(sides[-1].close)
        for side in sides:
            side.ready()
        for side in sides:
            side.step(False)
        taken: dict[str, list[StepRecord]] = {name: [] for name in names}
        for _ in range(steps):
            for side in sides:
                taken[side.name].append(side.step(False))
    return taken


def summed_up(steps: Sequence[StepRecord], size: StepSize, device: str) -> SideFigures:
    """A side's figures. Memory is from its process's start."""
    dtype = compute_dtype(device)
    cost = Cost(size.shape, measure_ceilings(device, dtype), dtype.itemsize, Update(reference_pass=True))
    return side_figures(steps, 0, cost, [(step.work, step.trained) for step in steps if step.work])
