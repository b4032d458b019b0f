"""How the cost of a step grows with G, P, C, the model, pictures and ranks, phase by phase.

    python bench/bench_scaling.py --device cpu --out bench/results/scaling-cpu.json

A step is our sampler's rollout, the packed update with a frozen reference model, AdamW and the sync of weights, on a
small Qwen2-VL with random weights; one thing is varied at a time. Beside the JSON goes a plot, and each cost in words.
On a CPU, seconds are one thread's processor time, which other programs lengthen less than the clock's; ranks, which
wait for each other, go by the clock.
"""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed
from accelerate import Accelerator
from fastgrpo_kernels import LossParams
from fastgrpo_profiling import span
from fastgrpo_profiling.phases import PHASES, phase_seconds
from fastgrpo_profiling.span import SpanRecorder, record
from harness import Result, parser, print_table
from scaling_fit import NEGLIGIBLE, Axis, exponent, ranks_sentence, sentence
from timing import synchronize
from torch import Tensor
from workloads import ModelSize, NoTexts, Workload, build_model, build_prompt, scripted_completions, training_group

from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.types import SamplingParams
from fastgrpo.update.updater import PackedUpdater

matplotlib.use("Agg")
from matplotlib import pyplot

MISMATCH = 1e-4
"""Nats that the sampler's log-probs and the update's may be apart in float32, on average."""
MISMATCH_BF16 = 3e-2


VOCABULARY = 768


@dataclass(frozen=True)
class Point:
    """One step."""

    work: Workload = Workload(prompts=2, lengths=(32,) * 8, text_tokens=(64,), patches=12)
    hidden: int = 128

    @property
    def model(self) -> ModelSize:
        heads = self.hidden // 32
        return ModelSize(VOCABULARY, self.hidden, 2 * self.hidden, 4, heads, heads // 2, 1, 32, 2, 3)

    def with_(self, **changes: Any) -> "Point":
        return replace(self, work=replace(self.work, **changes))


BASE = Point()
AXES: dict[str, tuple[str, list[Point]]] = {
    "G": ("completions of a prompt", [BASE.with_(lengths=(32,) * g) for g in (2, 4, 8, 16, 32, 64)]),
    "P": ("prompt tokens", [BASE.with_(text_tokens=(p - 36,)) for p in (64, 128, 256, 512, 1024, 2048)]),
    "C": ("new tokens of a completion", [BASE.with_(lengths=(c,) * 8) for c in (16, 32, 64, 128, 256)]),
    "N": ("parameters of the decoder's layers", [replace(BASE, hidden=h) for h in (64, 128, 256, 512)]),
    "pictures": ("pictures of a prompt", [BASE.with_(pictures=n) for n in (1, 2, 4, 8)]),
}
RANKS_POINT = BASE.with_(prompts=8)
RANKS = (1, 2)


def value_of(axis: str, point: Point) -> float:
    """Where a point lies along an axis."""
    work, size = point.work, point.model
    if axis == "N":
        return 9.0 * size.layers * size.hidden**2  # 3 of attention with half as many KV heads, 6 of the MLP
    return float({"G": work.group, "P": work.prompt_tokens, "C": work.new_tokens, "pictures": work.pictures}[axis])


class Stepper:
    """Takes steps of one size, on this rank's share of the prompts."""

    def __init__(self, point: Point, device: str, accelerator: Accelerator | None = None) -> None:
        model = build_model(point.model, device)
        frozen = copy.deepcopy(model).requires_grad_(False)
        self.device = device
        alone_on_cpu = accelerator is None and device == "cpu"
        self.clock = time.process_time if alone_on_cpu else time.perf_counter
        rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self.work, self.count = point.work, point.work.prompts * sum(point.work.lengths)
        self.prompts = [build_prompt(row, self.work, VOCABULARY) for row in range(rank, self.work.prompts, ranks)]
        self.engine = SamplerEngine(model, NoTexts())
        self.updater = PackedUpdater(
            model.train(), LossParams(beta=0.04), token_budget=16_384, reference_model=frozen, accelerator=accelerator
        )
        if accelerator is not None:
            self.updater.model = accelerator.prepare_model(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self.taken = 0

    def step(self) -> tuple[float, dict[str, float], float]:
        """Seconds, seconds by phase, and the mean log-prob mismatch in nats."""
        recorder = SpanRecorder(clock=self.clock, on_device=self.device == "cuda")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        synchronize(self.device)
        start = self.clock()
        with record(recorder):
            self.engine.sync()
            params = SamplingParams(self.work.new_tokens)
            drawn = self.engine.generate(self.prompts, self.work.group, params, step=self.taken)
            # What is compared are log-probs of the full softmax.
            full = [(prompt, [replace(c, sampling_logprobs=c.logprobs) for c in group]) for prompt, group in drawn]
            groups = [training_group(prompt, completions, self.count) for prompt, completions in full]
            result = self.updater.accumulate(groups)
            with span("update/optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            synchronize(self.device)
            seconds = self.clock() - start
        self.taken += 1
        own = {name: total.self_seconds for name, total in recorder.totals.items()}
        mismatch = result.mismatch.difference_sum / result.mismatch.token_count
        return seconds, phase_seconds(own, seconds), mismatch.item()

    def scripted_loss(self) -> Tensor:
        """Of completions that depend on the row alone, so that the loss of all ranks together can be compared."""
        groups = [
            training_group(prompt, scripted_completions(prompt.row_id, self.work, VOCABULARY), self.count)
            for prompt in self.prompts
        ]
        return self.updater.accumulate(groups).loss


def measure(points: Sequence[Point], device: str, rounds: int) -> tuple[list[float], list[dict[str, float]], float]:
    """Median seconds and phases of each point, the points taking turns; and the worst log-prob mismatch."""
    steppers = [Stepper(point, device) for point in points]
    worst = max(stepper.step()[2] for stepper in steppers)
    taken: list[list[tuple[float, dict[str, float], float]]] = [[] for _ in steppers]
    for _ in range(rounds):
        for stepper, steps in zip(steppers, taken, strict=True):
            steps.append(stepper.step())
    middle = [sorted(steps, key=lambda step: step[0])[len(steps) // 2] for steps in taken]
    return [seconds for seconds, _, _ in middle], [phases for _, phases, _ in middle], worst


def axis_of(name: str, points: Sequence[Point], device: str, rounds: int, result: Result) -> Axis:
    """Measures one axis; its points' mismatch is a check."""
    seconds, by_phase, worst = measure(points, device, rounds)
    result.checks[f"{name}: sampler and update agree"] = worst <= (MISMATCH if device == "cpu" else MISMATCH_BF16)
    names = [phase.name for phase in PHASES if any(phase.name in found for found in by_phase)]
    phases = {name: [found.get(name, 0.0) for found in by_phase] for name in names}
    axis = Axis(name, AXES[name][0], [value_of(name, point) for point in points], seconds, phases)
    result.figures[name] = {
        "values": axis.values,
        "seconds": seconds,
        "phases": phases,
        "exponent": exponent(axis.values, seconds),
        "phase_exponents": {phase: exponent(axis.values, taken) for phase, taken in phases.items() if min(taken) > 0},
    }
    return axis


def measure_ranks(device: str, rounds: int, result: Result) -> str:
    """The same prompts on one process and on two; a sentence."""
    seconds, phases, losses = {}, {}, {}
    for ranks in RANKS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        flags = ["--device", device, "--rank-steps", str(rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run([*command, __file__, *flags], env=environment, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"{ranks} ranks failed:\n{run.stderr[-2000:]}")
        found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"seconds"')))
        seconds[ranks], phases[ranks], losses[ranks] = found["seconds"], found["phases"], found["loss"]
    result.checks["ranks: the same loss"] = abs(losses[2] - losses[1]) <= 1e-5 * (1 + abs(losses[1]))
    result.figures["ranks"] = {"seconds": seconds, "phases": phases, "prompts": RANKS_POINT.work.prompts}
    return ranks_sentence(seconds, phases)


def take_rank_steps(device: str, rounds: int) -> None:
    """In each rank's process: steps on its share; rank 0 prints its median one."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=device == "cpu")
    stepper = Stepper(RANKS_POINT, device, accelerator)
    stepper.step()
    steps = sorted((stepper.step()[:2] for _ in range(rounds)), key=lambda step: step[0])
    loss = accelerator.reduce(stepper.scripted_loss(), "sum").item()
    if accelerator.is_main_process:
        seconds, phases = steps[len(steps) // 2]
        print(json.dumps({"seconds": seconds, "phases": phases, "loss": loss}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def draw(axes: Sequence[Axis], path: Path) -> None:
    """Log-log, an axis a panel, the whole step in black; a dotted line grows in proportion."""
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.2 * len(axes), 3.6), squeeze=False)
    spoken = {name for axis in axes for name, s in axis.phases.items() if max(s) >= NEGLIGIBLE * max(axis.seconds)}
    colours = {name: f"C{i}" for i, name in enumerate(phase.name for phase in PHASES if phase.name in spoken)}
    for panel, axis in zip(panels[0], axes, strict=True):
        for phase in (phase for phase in colours if phase in axis.phases):
            panel.loglog(axis.values, axis.phases[phase], color=colours[phase], marker=".", label=phase)
        panel.loglog(axis.values, axis.seconds, color="black", marker="o", label="step")
        guide = [axis.seconds[0] * value / axis.values[0] for value in axis.values]
        panel.loglog(axis.values, guide, color="grey", linestyle=":", label="in proportion")
        panel.set_xticks(axis.values, [short(value) for value in axis.values])
        panel.xaxis.minorticks_off()
        panel.set_xlabel(f"{axis.name}: {axis.what}", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0][0].set_ylabel("seconds", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def short(value: float) -> str:
    """2.2M, 139k, 64."""
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:,.0f}"


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3, help="timed steps of each point")
    arguments.add_argument("--only", nargs="+", choices=(*AXES, "ranks"), default=[*AXES, "ranks"])
    arguments.add_argument("--points", type=int, default=9, help="the first N points of each axis")
    arguments.add_argument("--rank-steps", type=int, help="take steps as one rank of several")
    options = arguments.parse_args()
    too_few = options.device == "cuda" and torch.cuda.device_count() < max(RANKS)
    if options.rank_steps:
        take_rank_steps(options.device, options.rank_steps)
        return 0
    torch.set_num_threads(1)
    result = Result("bench_scaling", options.device)
    axes, sentences, rows = [], [], []
    for name in (name for name in AXES if name in options.only):
        axis = axis_of(name, AXES[name][1][: options.points], options.device, options.rounds, result)
        axes.append(axis)
        sentences.append(sentence(axis))
        for i, value in enumerate(axis.values):
            shares = {phase: seconds[i] / axis.seconds[i] for phase, seconds in axis.phases.items()}
            largest = sorted(shares, key=lambda phase: -shares[phase])[:3]
            rows.append([f"{name} = {value:,.0f}", axis.seconds[i], ", ".join(f"{p} {shares[p]:.0%}" for p in largest)])
    if "ranks" in options.only and too_few:
        print(f"Left out: ranks (they need {max(RANKS)} GPUs)")
    elif "ranks" in options.only:
        sentences.append(measure_ranks(options.device, options.rounds, result))
    result.figures["sentences"] = sentences
    print_table("A step", ["point", "seconds", "most of it"], rows)
    print("\n".join(sentences))
    if options.out and axes:
        draw(axes, Path(options.out).with_suffix(".png"))
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
