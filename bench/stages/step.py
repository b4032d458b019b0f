"""The paper's step end to end, on Qwen2-VL-2B's shape with random weights: 8 prompts × 8, exactly 700 new tokens."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_step import SETTINGS, save_endless_model
from fastgrpo_profiling.compare import StepRecord
from fastgrpo_profiling.memory_estimate import StepSetting, step_bytes
from fastgrpo_profiling.report import Cost, SideFigures, side_figures
from fastgrpo_profiling.roofline import ModelShape, StepWork, Update, measure_ceilings
from harness import Result, compute_dtype, print_table
from transformers import AutoConfig

from fastgrpo.cli.arguments import parse
from fastgrpo.config import GRPOConfig
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_sat_parquet
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OURS, PLAIN
from fastgrpo.profile.run import QUIET, free_memory
from fastgrpo.profile.sides.start import build_trainer, start_side
from stages import Task, costs_only

BENCH = Path(__file__).parents[1]
TRL_PYTHON = BENCH.parent / ".venv-bench" / "bin" / "python"
GATE_TOKENS = 32
"""New tokens of the completions that both sides are compared on."""
LOGPROB_BYTES = 4 << 30
"""Of the head's scratch, for the estimate; a run takes half of what is free."""


@dataclass(frozen=True)
class StepSize:
    """A step, and the model that takes it."""

    prompts: int
    group: int
    tokens: int
    max_pixels: int
    text: dict[str, Any]
    vision: dict[str, Any]
    timed: int
    """Steps timed."""
    is_large: bool = False
    """Layers are checkpointed, as in the paper's run."""


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, rope: list[int]) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": rope},
    }


QWEN2_VL_2B = StepSize(
    prompts=8,
    group=8,
    tokens=700,
    max_pixels=401_408,
    text={**_text(1536, 8960, 28, 12, 2, [16, 24, 24]), "vocab_size": 151_936},
    vision={"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    timed=3,
    is_large=True,
)
TINY = StepSize(
    prompts=2,
    group=4,
    tokens=24,
    max_pixels=112**2,
    text={**_text(128, 256, 3, 4, 2, [4, 6, 6]), "vocab_size": 1000},
    vision={"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 3},
    timed=2,
)
SMOKE = StepSize(
    prompts=1,
    group=2,
    tokens=4,
    max_pixels=84**2,
    text={**_text(64, 128, 2, 2, 1, [4, 6, 6]), "vocab_size": 1000},
    vision={"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2},
    timed=1,
)
SIZES = {"full": QWEN2_VL_2B, "tiny": TINY, "smoke": SMOKE}


def settings_of(size: StepSize, device: str) -> dict[str, Any]:
    """Of both sides. A micro-batch of the padded side is one prompt's group, as in the paper's run."""
    return {
        **SETTINGS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": size.prompts,
        "num_generations": size.group,
        "max_completion_length": size.tokens,
        "min_pixels": size.max_pixels,
        "max_pixels": size.max_pixels,
        "learning_rate": 1e-6,
        "top_k": 50,
        "gradient_checkpointing": size.is_large,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
    }


@contextmanager
def prepared(size: StepSize, device: str) -> Iterator[Path]:
    """A folder with the model and data, and config.yaml, which names them."""
    # The sides' processes read the reward from here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCH), *filter(None, sys.path)])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_endless_model(folder / "model", size.text, size.vision, dtype=compute_dtype(device), device=device)
        write_sat_parquet(folder / "sat.parquet", size.prompts * (size.timed + 4), 0, kinds=DEMO_KINDS)
        places = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "sat.parquet")}
        (folder / "config.yaml").write_text(yaml.safe_dump({**settings_of(size, device), **places}))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield folder


def training_flags(folder: Path, size: StepSize) -> list[str]:
    """Of `fastgrpo train`, for every side."""
    quiet = [token for name, value in QUIET.items() for token in (f"--{name}", value)]
    # A side answers for a step where the next one begins: one more than are taken.
    return ["--config", str(folder / "config.yaml"), *quiet, "--max_steps", str(size.timed + 2)]


def run(task: Task) -> Iterator[Result]:
    """Our side alone. Its time comes first, since it is what a short lease is for; then whether its loss, gradients and
    log-probs are plain torch's; last a step without checkpointing. A part that fails costs what it is about."""
    result, size = Result("step", task.device), SIZES[task.scale]
    result.figures["model"] = "Qwen2-VL-2B" if task.scale == "full" else task.scale
    with prepared(size, task.device) as folder:
        flags = training_flags(folder, size)
        with costs_only(result, "step"):
            result.figures |= our_figures(flags, folder, size, task.device, result, size.is_large)
        yield result
        with costs_only(result, "comparison"):
            checked = compare_with_plain(flags, folder, size)
            result.checks["plain torch's step"] = not checked.failures
            result.figures["apart"] = checked.figures
            if checked.failures:
                print("The times above count for nothing:", "; ".join(checked.failures))
        yield result
        if size.is_large:
            with costs_only(result, "without checkpointing"):
                unchecked = [*flags, "--gradient_checkpointing", "false"]
                found = our_figures(unchecked, folder, size, task.device, result, False)
                result.figures["without checkpointing"] = found
            yield result


def our_figures(
    flags: Sequence[str], folder: Path, size: StepSize, device: str, result: Result, checkpointing: bool
) -> dict[str, Any]:
    """Times and peak of our side, beside what shapes say the peak should be."""
    (steps,) = timed_steps([OURS], flags, folder, size.timed).values()
    figures = summed_up(steps, folder, device)
    estimate = memory_estimate(steps[-1].work, size, folder, checkpointing)
    drawn = size.prompts * size.group * size.tokens
    result.checks[f"exactly {size.tokens} tokens each"] = figures.tokens == drawn
    rows = [["whole step, s", figures.step_seconds.median], *([f"{name}, s", s] for name, s in figures.phases.items())]
    rows += [["peak, GB", figures.peak_bytes / 1e9], ["… estimated for a GPU", sum(estimate.values()) / 1e9]]
    way = " checkpointed" if checkpointing else ""
    print_table(f"A step of {size.prompts} × {size.group} × {size.tokens}{way}", ["", "measured"], rows)
    return {**asdict(figures), "estimated_bytes": estimate}


def memory_estimate(work: StepWork | None, size: StepSize, folder: Path, checkpointing: bool) -> dict[str, float]:
    """Bytes by what they are for, by shapes alone (`step_bytes`)."""
    assert work is not None
    setting = StepSetting(
        prompts=size.prompts,
        group=size.group,
        prompt_tokens=max(work.prompts),
        completion_tokens=size.tokens,
        picture_patches=max(work.pictures),
        token_budget=GRPOConfig.token_budget,
        logprob_bytes=LOGPROB_BYTES,
        checkpointing=checkpointing,
        has_reference=True,
    )
    return step_bytes(shape_of(folder), setting)


def compare_with_plain(flags: Sequence[str], folder: Path, size: StepSize) -> gate.Gate:
    """What both sides make of the first prompts, one after the other: two such models do not fit one GPU."""
    short = ["--max_completion_length", str(min(size.tokens, GATE_TOKENS))]
    config, script = parse([*flags, *short, "--output_dir", str(folder / "gate")])
    answer = gate.answer_of(build_trainer(OURS, config, script))
    free_memory()
    checked = gate.compare(answer, build_trainer(PLAIN, config, script), gate.tolerances(config, script.dtype))
    free_memory()
    return checked


def shape_of(folder: Path) -> ModelShape:
    """Of the model in the folder."""
    return ModelShape.from_config(AutoConfig.from_pretrained(folder / "model"))


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


def summed_up(steps: Sequence[StepRecord], folder: Path, device: str) -> SideFigures:
    """A side's figures. Memory is from its process's start."""
    dtype = compute_dtype(device)
    cost = Cost(shape_of(folder), measure_ceilings(device, dtype), dtype.itemsize, Update(reference_pass=True))
    return side_figures(steps, 0, cost, [(step.work, step.trained) for step in steps if step.work])
