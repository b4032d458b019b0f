"""The paper's step of both sides: whether it is the same step, then its time."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from fastgrpo_profiling.compare import StepRecord
from harness import Result, print_table
from step_setup import SIZES, TRL_PYTHON, StepSize, prepared, training_flags

from fastgrpo.cli.arguments import parse
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OURS, PLAIN, TRL
from fastgrpo.profile.run import free_memory
from fastgrpo.profile.sides.start import build_trainer
from fastgrpo.profile.trl import compare_with_trl
from stages import NotHereError, Task, costs_only
from stages.step import GATE_TOKENS, as_auto, compare_with_plain, summed_up, timed_steps

SIDE_BYTES = 60e9
"""Of one side of full size, weights in float32: two of them fit no GPU of 80 GB."""


def against_plain(task: Task) -> Iterator[Result]:
    """The other side is HF `generate` and the padded batch."""
    yield from compared(PLAIN, task)


def against_trl(task: Task) -> Iterator[Result]:
    """The same, against TRL as installed in `.venv-bench`.

    Raises:
        NotHereError: there is no such environment.
    """
    if not TRL_PYTHON.is_file():
        raise NotHereError("no .venv-bench here: `make install-bench` makes it")
    yield from compared(TRL, task)


def compared(against: str, task: Task) -> Iterator[Result]:
    """Ours first, then theirs; in turn where the GPU has room for both. Ratios only where both take the same step.

    Layers of a large model are checkpointed on the other side, as is TRL's default; ours leaves that to `auto`.
    """
    size = SIZES[task.scale]
    result = Result(f"step_{against}", task.device)
    with prepared(size, task.device) as folder:
        flags = training_flags(folder, size.timed + 2)
        taken: dict[str, list[StepRecord]] = {}
        for names in [[OURS, against]] if both_fit(size, task.device) else [[OURS], [against]]:
            alone = size.is_large and names == [OURS]
            with costs_only(result, " and ".join(names)):
                timed = 1 if size.is_large and not alone else size.timed
                taken |= timed_steps(names, as_auto(flags) if alone else flags, folder, timed)
            result.figures |= {name: asdict(summed_up(steps, size, task.device)) for name, steps in taken.items()}
            yield result
        with costs_only(result, "comparison"):
            checked = compare(against, flags, folder, size)
            result.checks["the same step"] = not checked.failures
            result.figures["apart"] = checked.figures
            print("\n".join(checked.failures))
        for name, steps in taken.items():
            exact = all(step.tokens == size.drawn for step in steps)
            result.checks[f"{name}: exactly {size.tokens} tokens each"] = exact
        if result.passed:
            seconds = {name: median(step.seconds for step in steps) for name, steps in taken.items()}
            result.ratios = {
                f"step_time_vs_{against}": seconds[against] / seconds[OURS],
                f"peak_memory_vs_{against}": taken[against][-1].peak_bytes / taken[OURS][-1].peak_bytes,
            }
            rows = [[name, seconds[name], steps[-1].peak_bytes / 1e9] for name, steps in taken.items()]
            print_table("A step", ["side", "s", "peak GB"], rows)
        yield result


def both_fit(size: StepSize, device: str) -> bool:
    """Whether both sides' processes may run at a time."""
    if device == "cpu" or not size.is_large:
        return True
    return torch.cuda.get_device_properties(0).total_memory > 2 * SIDE_BYTES


def compare(against: str, flags: Sequence[str], folder: Path, size: StepSize) -> gate.Gate:
    """Prompts, loss, gradients and log-probs of the first prompts, one side after the other."""
    if against != TRL:
        return compare_with_plain(flags, folder, size)
    flags = [*flags, "--max_completion_length", str(min(size.tokens, GATE_TOKENS))]
    config, script = parse([*flags, "--output_dir", str(folder / "gate")])
    answer = gate.answer_of(build_trainer(OURS, config, script))
    free_memory()
    return compare_with_trl(answer, gate.tolerances(config, script.dtype), flags, folder, TRL_PYTHON)
