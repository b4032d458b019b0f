"""What the paper's step should take on a GPU and how much memory, by count: `python bench/predict_step.py --gpu h100`.

8 prompts × 8 completions × 700 tokens, Qwen2-VL-2B, beta 0.04. Nothing runs on a GPU here: FLOPs, bytes and kernels are
counted (`fastgrpo_profiling.prediction`, `fastgrpo_profiling.memory_estimate`) and divided by rates that were measured.
"""

import argparse
import sys

from fastgrpo_profiling.memory_estimate import StepSetting, step_bytes
from fastgrpo_profiling.prediction import BEFORE, GPUS, NOW, Counts, Gpu, decode_step_seconds, step_seconds
from fastgrpo_profiling.roofline import ModelShape, StepWork
from harness import Result, print_table
from workloads import MODELS

QWEN2_VL_2B = ModelShape.from_config(MODELS["2B"].config)
PATCHES = 401_408 // 14**2
PROMPTS, GROUP, TOKENS = 8, 8, 700
WORDS = 68
"""Tokens of a prompt beside its picture's: the base template and a question of SAT."""
WORK = StepWork([PATCHES // 4 + WORDS] * PROMPTS, [PATCHES] * PROMPTS, [[TOKENS] * GROUP] * PROMPTS)


def step_setting(counts: Counts, token_budget: int, checkpointing: bool) -> StepSetting:
    return StepSetting(
        prompts=PROMPTS,
        group=GROUP,
        prompt_tokens=WORK.prompts[0],
        completion_tokens=TOKENS,
        picture_patches=PATCHES,
        token_budget=token_budget,
        logprob_bytes=4.5e9,
        checkpointing=checkpointing,
        has_reference=True,
        half_reference=counts.half_reference,
    )


def decode_step(gpu: Gpu, counts: Counts) -> dict[str, float]:
    """Half-way through the completions."""
    kv = QWEN2_VL_2B.kv_bytes * (sum(WORK.prompts) + PROMPTS * GROUP * TOKENS / 2)
    return decode_step_seconds(gpu, QWEN2_VL_2B, PROMPTS * GROUP, kv, counts)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    arguments.add_argument("--token_budget", type=int, default=16_384)
    arguments.add_argument("--out", metavar="FILE", help="also write the JSON record here")
    options = arguments.parse_args()
    gpu, result = GPUS[options.gpu], Result("predict_step", "cpu")
    sides = {"before": BEFORE, "now": NOW}
    found = {name: step_seconds(gpu, QWEN2_VL_2B, WORK, counts) for name, counts in sides.items()}
    phases = list(dict.fromkeys(phase for one in found.values() for phase in one))
    rows = [[phase, *(one.get(phase, 0.0) for one in found.values())] for phase in phases]
    rows.append(["total", *(sum(one.values()) for one in found.values())])
    print_table(f"The paper's step on one {gpu.name}, predicted, seconds", ["phase", *found], rows)
    parts = {name: decode_step(gpu, counts) for name, counts in sides.items()}
    rows = [[part, *(1e3 * one[part] for one in parts.values())] for part in parts["now"]]
    rows.append(["total", *(1e3 * sum(one.values()) for one in parts.values())])
    print_table("A decode step half-way, milliseconds", ["part", *parts], rows)
    memory = {
        "checkpointed": step_bytes(QWEN2_VL_2B, step_setting(NOW, options.token_budget, True)),
        "not checkpointed": step_bytes(QWEN2_VL_2B, step_setting(NOW, options.token_budget, False)),
    }
    rows = [[part, *(one[part] / 1e9 for one in memory.values())] for part in memory["checkpointed"]]
    rows.append(["total", *(sum(one.values()) / 1e9 for one in memory.values())])
    print_table(f"Memory, GB of {gpu.memory_bytes / 1e9:.0f}", ["for", *memory], rows)
    used = memory["checkpointed" if NOW.checkpointing else "not checkpointed"]
    result.checks["it fits"] = sum(used.values()) <= gpu.memory_bytes
    result.figures = {
        "gpu": gpu.name,
        "total_s": sum(found["now"].values()),
        "before_s": sum(found["before"].values()),
        "phases": found["now"],
        "decode_step_ms": 1e3 * sum(parts["now"].values()),
        "peak_gb": sum(used.values()) / 1e9,
        "memory_gb": {part: size / 1e9 for part, size in used.items()},
    }
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
