"""What `from fastgrpo import GRPOTrainer, SFTTrainer` gives: trainers which sum up their run when they have trained."""

import json
import time
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from fastgrpo.atomic_files import write_aside
from fastgrpo.report.finish import finish_run
from fastgrpo.safe_text.redaction import redacted
from fastgrpo.training import sft, trainer
from fastgrpo.training.run_trainer import RunTrainer


class SummedUp(RunTrainer):
    """Leaves settings.json, summary.json and report.html, as `fastgrpo train` does."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as the base does, then sums up."""
        start = time.perf_counter()
        output = super().train(*args, **kwargs)
        if self.is_world_process_zero():
            finish_run(Path(self.config.output_dir), seed=self.config.seed, wall_s=time.perf_counter() - start)
        return output

    def run_begins(self) -> None:
        """Writes settings.json."""
        settings = self.config.to_dict() | {
            "run_id": self.run_log.run_id() if self.run_log else None,
            "model_name_or_path": getattr(self.model.config, "_name_or_path", None),
            **({"reward_funcs": self.reward_names} if self.reward_names else {}),
        }
        text = json.dumps(redacted(settings), indent=2, default=str) + "\n"
        write_aside(Path(self.config.output_dir) / "settings.json", lambda path: path.write_text(text))


class GRPOTrainer(SummedUp, trainer.GRPOTrainer):
    __doc__ = trainer.GRPOTrainer.__doc__


class SFTTrainer(SummedUp, sft.SFTTrainer):
    __doc__ = sft.SFTTrainer.__doc__
