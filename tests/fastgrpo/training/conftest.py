from pathlib import Path
from typing import Any

import pytest
from run_files import token_sum

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.trainer import GRPOTrainer


@pytest.fixture
def build(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Any:
    """A trainer with quick settings: two prompts a step, four completions each, at most six tokens long."""

    def make(
        reward_funcs: Any = token_sum, model: Any = None, train_dataset: Any = None, **overrides: Any
    ) -> GRPOTrainer:
        parts = {
            name: overrides.pop(name)
            for name in ("eval_dataset", "callbacks", "peft_config", "processing_class", "optimizers")
            if name in overrides
        }
        trainer_class = overrides.pop("trainer_class", GRPOTrainer)
        settings = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "save_strategy": "no",
            "max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6,
            "learning_rate": 0.1, "logging_steps": 1, "disable_tqdm": True,
        }  # fmt: skip
        return trainer_class(
            model=str(tiny_model_dir) if model is None else model,
            reward_funcs=reward_funcs,
            args=GRPOConfig(**settings | overrides),
            train_dataset=load_rows(str(sat_file)) if train_dataset is None else train_dataset,
            **parts,
        )

    return make
