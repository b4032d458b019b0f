"""A training step that sides are compared on: its size, its settings, and a folder with its model, data and config."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from fastgrpo_profiling.memory_estimate import TOKEN_BUDGET, StepSetting, fits_unchecked, step_bytes
from fastgrpo_profiling.roofline import ModelShape, StepWork
from workloads import MODELS, save_endless_model

from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_sat_parquet
from fastgrpo.profile.run import QUIET

BENCH = Path(__file__).parent
TRL_PYTHON = BENCH.parent / ".venv-bench" / "bin" / "python"
WORDS = 68
"""Tokens of a prompt beside its picture's: the base template and a question of SAT."""
LOGPROB_BYTES = 4.5e9
"""Of the head's scratch, for estimates; a run takes half of what is free."""
SETTINGS = {
    "prompt_mode": "base",
    "batch_unit": "prompts",
    "loss_type": "grpo",
    "beta": 0.04,
    "lr_scheduler_type": "constant",
    "reward_funcs": ["smooth_reward:vowels"],
    "attn_implementation": "sdpa",
    "log_completions": False,
}
"""Of every step and side."""


@dataclass(frozen=True)
class StepSize:
    """A step, and the model that takes it."""

    prompts: int
    group: int
    tokens: int
    """Exactly so many of each completion: the end token lies outside the vocabulary."""
    pixels: int
    """Of a picture."""
    model: str
    timed: int = 3
    """Steps timed."""
    is_large: bool = False
    """Layers are checkpointed and a micro-batch of the padded side is one prompt's group, as in the paper's run."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further settings."""

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return ModelShape.from_config(MODELS[self.model].config)

    @property
    def work(self) -> StepWork:
        """In tokens and patches; a prompt's words by a guess."""
        patches = self.pixels // 14**2
        completions = [[self.tokens] * self.group] * self.prompts
        return StepWork([patches // 4 + WORDS] * self.prompts, [patches] * self.prompts, completions)

    def memory(self, *, checkpointing: bool, half_reference: bool = True) -> dict[str, float]:
        """Bytes of a step on a GPU by what they are for, by shapes alone (`step_bytes`)."""
        return step_bytes(self.shape, self._setting(checkpointing, half_reference))

    def fits_unchecked(self, memory: float) -> bool:
        """Whether a run with gradient_checkpointing=auto leaves it off on a GPU of so many bytes."""
        return fits_unchecked(self.shape, self._setting(checkpointing=False), memory)

    def _setting(self, checkpointing: bool, half_reference: bool = True) -> StepSetting:
        return StepSetting(
            prompts=self.prompts,
            group=self.group,
            prompt_tokens=self.work.prompts[0],
            completion_tokens=self.tokens,
            picture_patches=self.work.pictures[0],
            token_budget=TOKEN_BUDGET,
            logprob_bytes=LOGPROB_BYTES,
            checkpointing=checkpointing,
            has_reference=True,
            half_reference=half_reference,
        )

    @property
    def drawn(self) -> int:
        """Completion tokens of a step."""
        return self.prompts * self.group * self.tokens

    def settings(self, device: str) -> dict[str, Any]:
        """Of `fastgrpo train`, for every side."""
        micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": self.prompts}
        return {
            **SETTINGS,
            **(micro if self.is_large else {"per_device_train_batch_size": self.prompts}),
            "num_generations": self.group,
            "max_completion_length": self.tokens,
            "min_pixels": self.pixels,
            "max_pixels": self.pixels,
            "gradient_checkpointing": self.is_large,
            "bf16": device == "cuda",
            "use_cpu": device == "cpu",
            **dict(self.options),
        }


PAPER = StepSize(8, 8, 700, 401_408, "2B", is_large=True, options=(("learning_rate", 1e-6), ("top_k", 50)))
SIZES = {
    "full": PAPER,
    "tiny": StepSize(2, 4, 24, 112**2, "1M", timed=2, options=PAPER.options),
    "smoke": StepSize(1, 2, 4, 84**2, "smoke", timed=1, options=PAPER.options),
}
"""Of the suite's stages."""
AGAINST_TRL = StepSize(4, 8, 64, 336**2, "3M", timed=5, options=(("learning_rate", 3e-4),))
"""Of `bench_step.py`."""


@contextmanager
def prepared(size: StepSize, device: str, folder: Path | None = None, rows: int = 0) -> Iterator[Path]:
    """A folder, by default a temporary one, with the model, data of at least `rows`, and the config that names them."""
    # The sides' processes read the reward from here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCH), *filter(None, sys.path)])
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        save_endless_model(folder / "model", MODELS[size.model], device=device)
        write_sat_parquet(folder / "sat.parquet", max(rows, size.prompts * (size.timed + 4)), 0, kinds=DEMO_KINDS)
        places = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "sat.parquet")}
        (folder / "config.yaml").write_text(yaml.safe_dump({**size.settings(device), **places}))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield folder


def training_flags(folder: Path, max_steps: int) -> list[str]:
    """Of `fastgrpo train`, for every side. It answers for a step where the next one begins: ask for one more."""
    flags = {**QUIET, "max_steps": max_steps}
    return ["--config", str(folder / "config.yaml"), *(t for name, x in flags.items() for t in (f"--{name}", str(x)))]
