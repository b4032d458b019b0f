"""Whole training steps of a tiny Qwen2-VL against another implementation, both in turn.

usage: python bench/bench_step.py [--against plain|paper|trl] [--device cpu]

A step: 4 prompts of a 336-px picture (144 image tokens) and some 70 tokens of text, 8 completions each of exactly 64
tokens (the end token lies outside the vocabulary), beta 0.04, float32, sdpa, no checkpointing, one micro-batch. Before
it, both sides' prompts, loss and gradients are compared; after it, what they learn: 3 seeds of 30 smaller steps (84-px
pictures, 24 tokens, 2 prompts), whose paired reward difference must be 0 within its 95 % interval, of half-width ≤ 0.1.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from harness import Result, parser
from safetensors import safe_open
from step_setup import AGAINST_TRL, prepared, training_flags

from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OPPONENTS, OURS, TRL
from fastgrpo.profile.run import ProfileOptions, run_profile
from fastgrpo.profile.sides.start import start_side

GATE_PROMPTS, GATE_TOKENS, GATE_PICTURE = 2, 24, 84
HALF_WIDTH = 0.1
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a 95 % interval, by number of seeds."""


def peak_above_start(against: str, settings: Sequence[str], folder: Path, trl_python: Path) -> dict[str, int]:
    """Most bytes each side holds within two steps beyond those it held when its model was loaded.

    In fresh processes that give freed memory back at once, so that peaks repeat; that makes them slow, so nothing is
    timed.
    """
    found = {}
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in (OURS, against):
        with ExitStack() as stack:
            side = start_side(name, settings, folder, trl_python=trl_python, environment=returning)
            stack.callback(side.close)
            held = side.ready()["held_bytes"]
            found[name] = max(side.step(False).peak_bytes for _ in range(2)) - held
    return found


def reward_differences(
    against: str, settings: Sequence[str], folder: Path, trl_python: Path, *, seeds: int, steps: int
) -> list[float]:
    """Per seed, the mean over its steps of our reward less theirs."""
    smaller = {
        "per_device_train_batch_size": GATE_PROMPTS,
        "max_completion_length": GATE_TOKENS,
        "min_pixels": GATE_PICTURE**2,
        "max_pixels": GATE_PICTURE**2,
        "max_steps": steps + 1,
    }
    changes = [token for name, value in smaller.items() for token in (f"--{name}", str(value))]
    differences = []
    for seed in range(seeds):
        flags = [*settings, *changes, "--seed", str(seed)]
        with ExitStack() as stack:
            pair = []
            for name in (OURS, against):
                pair.append(start_side(name, flags, folder / f"seed-{seed}", trl_python=trl_python))
                stack.callback(pair[-1].close)
            for side in pair:
                side.ready()
            rewards = [[side.step(False).reward for side in pair] for _ in range(steps)]
        differences.append(statistics.fmean(ours - theirs for ours, theirs in rewards))
        (first, _), (last, _) = rewards[0], rewards[-1]
        print(f"seed {seed}: our reward {first:.3f} → {last:.3f}, difference {differences[-1]:+.4f}", flush=True)
    return differences


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of independent values."""
    return statistics.fmean(values), T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def parameters_of(weights: Path) -> int:
    """Of the model in a safetensors file."""
    with safe_open(weights, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--against", choices=tuple(OPPONENTS), default=TRL)
    arguments.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    arguments.add_argument("--seeds", type=int, choices=tuple(T95), default=3)
    arguments.add_argument("--gate_steps", type=int, default=30, help="steps of each seed")
    arguments.add_argument("--folder", type=Path, help="keeps the page and the trace here")
    arguments.add_argument("--trl_python", type=Path, default=Path(".venv-bench/bin/python"))
    options = arguments.parse_args()
    result, size = Result("bench_step", options.device), AGAINST_TRL
    rows = max(size.prompts * (options.steps + 3), GATE_PROMPTS * (options.gate_steps + 1))
    with prepared(size, options.device, options.folder, rows) as folder:
        config, trl_python = folder / "config.yaml", options.trl_python
        profile = ProfileOptions(config, options.against, options.steps, 1, folder / "profile", trl_python)
        try:
            report = run_profile(profile)
        except gate.GateError as error:
            print(error, file=sys.stderr)
            result.checks["same_step"] = False
            return result.finish(options.out)
        result.figures["parameters"] = parameters_of(folder / "model" / "model.safetensors")
        settings = training_flags(folder, 3)
        memory = peak_above_start(options.against, settings, folder / "memory", trl_python)
        seeds, steps = options.seeds, options.gate_steps
        differences = reward_differences(options.against, settings, folder, trl_python, seeds=seeds, steps=steps)
    mean, half_width = interval(differences)
    ours, theirs = report.sides[report.ours], report.sides[report.theirs]
    result.checks |= {
        "same_step": True,
        **{f"apart: {name}": figure for name, figure in report.gate.items()},
        "exactly_64_tokens": ours.tokens == theirs.tokens == size.drawn,
        "reward_difference_holds_0": abs(mean) <= half_width,
        "reward_half_width_at_most_0.1": half_width <= HALF_WIDTH,
        "reward_difference": mean,
        "reward_half_width": half_width,
    }
    result.ratios |= {
        f"step_time_vs_{options.against}": report.speedup.median,
        f"tokens_per_s_vs_{options.against}": ours.tokens_per_s.median / theirs.tokens_per_s.median,
        f"peak_memory_vs_{options.against}": memory[options.against] / memory[OURS],
    }
    result.figures |= {"peak_bytes_above_start": memory}
    result.figures |= {"speedup": asdict(report.speedup), "unattributed": ours.unattributed}
    result.figures |= {name: asdict(side) for name, side in report.sides.items()}
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
