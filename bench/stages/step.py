"""The paper's step end to end, on Qwen2-VL-2B's shape with random weights: 8 prompts × 8, exactly 700 new tokens."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_step import SETTINGS, save_endless_model
from fastgrpo_profiling.compare import alternate
from fastgrpo_profiling.report import Cost, SideFigures, side_figures
from fastgrpo_profiling.roofline import ModelShape, Update, measure_ceilings
from harness import Result, print_table
from transformers import AutoConfig

from fastgrpo.cli.arguments import parse
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_sat_parquet
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OURS, PLAIN, TRL
from fastgrpo.profile.run import ProfileOptions, free_memory, run_profile, training_flags
from fastgrpo.profile.sides.start import build_trainer, start_side
from stages import NotHereError
from stages.ceilings import compute_dtype

BENCH = Path(__file__).parents[1]
TRL_PYTHON = BENCH.parent / ".venv-bench" / "bin" / "python"
GATE_TOKENS = 32
"""New tokens of the completions that both sides are compared on."""


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
    """Layers are checkpointed, as in the paper's run; two sides that share the GPU hold their weights in bfloat16."""


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
        write_sat_parquet(folder / "sat.parquet", size.prompts * (size.timed + 3), 0, kinds=DEMO_KINDS)
        places = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "sat.parquet")}
        (folder / "config.yaml").write_text(yaml.safe_dump({**settings_of(size, device), **places}))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield folder


def profile_options(folder: Path, against: str, steps: int, flags: Sequence[str] = ()) -> ProfileOptions:
    return ProfileOptions(folder / "config.yaml", against, steps, 1, folder / "profile", TRL_PYTHON, flags)


def run(scale: str, device: str) -> Iterator[Result]:
    """Our side alone. Its time comes first, since it is what a short lease is for; then whether its loss, gradients and
    log-probs are plain torch's; last a step without checkpointing. A part that fails costs what it is about."""
    result, size = Result("step", device), SIZES[scale]
    with prepared(size, device) as folder:
        settings = training_flags(profile_options(folder, PLAIN, size.timed))
        figures = time_ours(settings, folder, size, device)
        drawn = size.prompts * size.group * size.tokens
        result.checks[f"exactly {size.tokens} tokens each"] = figures.tokens == drawn
        result.figures |= {"model": "Qwen2-VL-2B" if scale == "full" else scale, **asdict(figures)}
        rows = [["whole step", figures.step_seconds.median], *([name, s] for name, s in figures.phases.items())]
        print_table(f"A step of {size.prompts} × {size.group} × {size.tokens}", ["phase", "s"], rows)
        yield result
        checked = compare_with_plain([*settings, "--max_completion_length", str(min(size.tokens, GATE_TOKENS))], folder)
        result.checks["plain torch's step"] = not checked.failures
        result.figures["apart"] = checked.figures
        if checked.failures:
            print("The times above count for nothing:", "; ".join(checked.failures))
        yield result
        if size.is_large:
            try:
                unchecked = time_ours([*settings, "--gradient_checkpointing", "false"], folder, size, device)
                result.figures["without checkpointing"] = asdict(unchecked)
            except RuntimeError as error:  # out of memory, most likely: said by the side's process
                result.figures["without checkpointing"] = str(error).strip()[-500:]
            yield result


def compare_with_plain(settings: Sequence[str], folder: Path) -> gate.Gate:
    """What both sides make of the first prompts, one after the other: two such models do not fit one GPU."""
    config, script = parse([*settings, "--output_dir", str(folder / "gate")])
    answer = gate.answer_of(build_trainer(OURS, config, script))
    free_memory()
    checked = gate.compare(answer, build_trainer(PLAIN, config, script), gate.tolerances(config, script.dtype))
    free_memory()
    return checked


def time_ours(settings: Sequence[str], folder: Path, size: StepSize, device: str) -> SideFigures:
    """Steps of our side in a process of its own, the first one untimed."""
    dtype = compute_dtype(device)
    shape = ModelShape.from_config(AutoConfig.from_pretrained(folder / "model"))
    cost = Cost(shape, measure_ceilings(device, dtype), dtype.itemsize, Update(reference_pass=True))
    side = start_side(OURS, settings, folder, trl_python=TRL_PYTHON)
    try:
        held = side.ready()["held_bytes"]
        steps = alternate([side], warmup=1, steps=size.timed).steps[side.name]
    finally:
        side.close()
    return side_figures(steps, held, cost, [(step.work, step.trained) for step in steps if step.work])


def against_plain(scale: str, device: str) -> Iterator[Result]:
    """Both sides in turn; the other is HF `generate` and the padded batch."""
    yield compared(PLAIN, scale, device)


def against_trl(scale: str, device: str) -> Iterator[Result]:
    """The same, against TRL as installed in `.venv-bench`.

    Raises:
        NotHereError: there is no such environment.
    """
    if not TRL_PYTHON.is_file():
        raise NotHereError("no .venv-bench here: `make install-bench` makes it")
    yield compared(TRL, scale, device)


def compared(against: str, scale: str, device: str) -> Result:
    """One step of each side timed after one that was not, or a few at smaller scales."""
    result, size = Result(f"step_{against}", device), SIZES[scale]
    flags = ["--dtype", "bfloat16"] if size.is_large else []
    with prepared(size, device) as folder:
        try:
            report = run_profile(profile_options(folder, against, 1 if scale == "full" else size.timed, flags))
        except gate.GateError as error:
            print(f"Not timed: {error}")
            result.checks["the same step"] = False
            return result
    ours, theirs = report.sides[report.ours], report.sides[report.theirs]
    drawn = size.prompts * size.group * size.tokens
    result.checks |= {
        "the same step": True,
        f"exactly {size.tokens} tokens each": ours.tokens == theirs.tokens == drawn,
    }
    result.ratios = {
        f"step_time_vs_{against}": report.speedup.median,
        f"peak_memory_vs_{against}": theirs.peak_bytes / ours.peak_bytes,
    }
    result.figures = {"apart": report.gate, **{name: asdict(side) for name, side in report.sides.items()}}
    return result
