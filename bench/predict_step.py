"""What the paper's step should take on a GPU and how much memory, by count: `python bench/predict_step.py --gpu h100`.

8 prompts × 8 completions × 700 tokens, Qwen2-VL-2B, beta 0.04. Nothing runs on a GPU here: FLOPs, bytes and kernels are
counted (`fastgrpo_profiling.prediction`, `fastgrpo_profiling.memory_estimate`) and divided by rates that were measured.
"""

import argparse
import sys
from dataclasses import replace

from fastgrpo_profiling.memory_estimate import TOKEN_BUDGET
from fastgrpo_profiling.prediction import BEFORE, GPUS, NOW, Counts, Gpu, decode_step_seconds, step_seconds
from harness import Result, print_table
from step_setup import PAPER

SHAPE, WORK = PAPER.shape, PAPER.work
GUESSES = 3


def decode_step(gpu: Gpu, counts: Counts, guesses: int = 0) -> dict[str, float]:
    """Half-way through the completions."""
    kv = SHAPE.kv_bytes * (sum(WORK.prompts) + (guesses + 1) * PAPER.drawn / 2)
    return decode_step_seconds(gpu, SHAPE, PAPER.prompts * PAPER.group, kv, counts, guesses=guesses)


def micro_batches_of(token_budget: int) -> int:
    """Of whole groups."""
    together = max(token_budget // (WORK.prompts[0] + PAPER.group * PAPER.tokens), 1)
    return -(-PAPER.prompts // together)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    arguments.add_argument("--out", metavar="FILE", help="also write the JSON record here")
    arguments.add_argument(
        "--accepted",
        type=float,
        help=f"tokens a row gains in a step with {GUESSES} guesses, for decode that speculates",
    )
    options = arguments.parse_args()
    gpu, result = GPUS[options.gpu], Result("predict_step", "cpu")
    checkpointing = not PAPER.fits_unchecked(gpu.memory_bytes)
    sides = {"before": BEFORE, "now": replace(NOW, checkpointing=checkpointing)}
    count = micro_batches_of(TOKEN_BUDGET)
    found = {name: step_seconds(gpu, SHAPE, WORK, counts, micro_batches=count) for name, counts in sides.items()}
    phases = list(dict.fromkeys(phase for one in found.values() for phase in one))
    rows = [[phase, *(one.get(phase, 0.0) for one in found.values())] for phase in phases]
    rows.append(["total", *(sum(one.values()) for one in found.values())])
    print_table(f"The paper's step on one {gpu.name}, predicted, seconds", ["phase", *found], rows)
    parts = {name: decode_step(gpu, counts) for name, counts in sides.items()}
    if options.accepted:
        parts["guessing"] = decode_step(gpu, sides["now"], GUESSES)
    rows = [[part, *(1e3 * one[part] for one in parts.values())] for part in parts["now"]]
    rows.append(["total", *(1e3 * sum(one.values()) for one in parts.values())])
    print_table("A decode step half-way, milliseconds", ["part", *parts], rows)
    memory = [PAPER.memory(checkpointing=way, half_reference=NOW.half_reference) for way in (True, False)]
    rows = [[part, *(one[part] / 1e9 for one in memory)] for part in memory[0]]
    rows.append(["total", *(sum(one.values()) / 1e9 for one in memory)])
    print_table(f"Memory, GB of {gpu.memory_bytes / 1e9:.0f}", ["for", "checkpointed", "not"], rows)
    used = memory[0 if checkpointing else 1]
    result.checks["it fits"] = sum(used.values()) <= gpu.memory_bytes
    result.figures = {
        "gpu": gpu.name,
        "total_s": sum(found["now"].values()),
        "before_s": sum(found["before"].values()),
        "checkpointing": checkpointing,
        "phases": found["now"],
        "decode_step_ms": 1e3 * sum(parts["now"].values()),
        "peak_gb": sum(used.values()) / 1e9,
        "memory_gb": {part: size / 1e9 for part, size in used.items()},
    }
    if options.accepted:
        longer = sum(parts["guessing"].values()) / sum(parts["now"].values())
        result.figures["decode_guessing_s"] = found["now"]["decode"] * longer / options.accepted
        print(f"Decode, guessing: {result.figures['decode_guessing_s']:.2f} s for {found['now']['decode']:.2f} s")
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
