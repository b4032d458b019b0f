"""A Trainer's checkpoints, made whole or absent."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from fastgrpo.atomic_files import publish
from fastgrpo.model.load import load_weights
from fastgrpo.training.checkpoints import ASIDE, load_state, save_state

logger = logging.get_logger(__name__)


class WholeCheckpoints(Trainer):
    """Has transformers write each checkpoint aside, adds `state_to_save`, and renames it when it is on disk."""

    _saving_aside = False

    def state_to_save(self) -> dict[str, Any]:
        """What a subclass keeps beside transformers' own state; read back with `checkpoints.load_state`."""
        return {}

    def save_more(self, folder: Path) -> None:
        """Writes what else a subclass keeps, in files of its own; called on the main process."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        aside = output_dir / ASIDE / name
        if self.args.should_save:
            shutil.rmtree(output_dir / ASIDE, ignore_errors=True)  # what a killed save left
        self.accelerator.wait_for_everyone()
        self._saving_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_aside = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(aside / "trainer_state.json"))
            self.save_more(aside)
            save_state(aside, {**self.state_to_save(), "sharding": self._sharding()})
            publish(aside, output_dir / name)
            shutil.rmtree(output_dir / ASIDE)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(output_dir / name))
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving_aside:  # an upload runs on while the folder gets its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / ASIDE) if self._saving_aside else folder

    def _sharding(self) -> list[int] | None:
        """How the optimizer's state is cut: ZeRO's stage and number of ranks; None where it is whole."""
        plugin = self.accelerator.state.deepspeed_plugin
        return None if plugin is None else [plugin.zero_stage, self.accelerator.num_processes]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Under another ZeRO stage, or on other ranks, a run goes on with an optimizer that starts anew."""
        mine = theirs = self._sharding()
        if resume_from_checkpoint is not None:
            theirs = load_state(Path(resume_from_checkpoint)).get("sharding", mine)
        if resume_from_checkpoint is None or theirs == mine:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        schedule = Path(resume_from_checkpoint) / SCHEDULER_NAME
        # DeepSpeed keeps a schedule of its own config in its own files, and cannot read another's.
        plugin = self.accelerator.state.deepspeed_plugin
        has_schedule = schedule.is_file() and (plugin is None or "scheduler" not in plugin.deepspeed_config)
        if self.is_world_process_zero():
            anew = "the optimizer's moments start anew" if has_schedule else "schedule and optimizer start anew"
            rounded = "" if theirs is None else " (16 bits of them, where DeepSpeed trained in those)"
            logger.warning(
                f"{resume_from_checkpoint} was saved under {_named(theirs)}, this run is under {_named(mine)}: "
                f"weights{rounded}{', step and schedule' if has_schedule else ' and step'} go on, {anew}."
            )
        if self.is_deepspeed_enabled:  # without it, transformers has just loaded them
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if has_schedule:
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate  # otherwise the optimizer's own state brings it
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None and not any(Path(resume_from_checkpoint).glob("*.safetensors")):
            raise ValueError(
                f"{resume_from_checkpoint} holds no whole weights. Save with stage3_gather_16bit_weights_on_model_save "
                "in the DeepSpeed config, or resume under the stage and on the ranks it was saved with."
            )
        if model is None and isinstance(self.model, PreTrainedModel):
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _named(sharding: list[int] | None) -> str:
    return "no DeepSpeed" if sharding is None else f"ZeRO stage {sharding[0]} on {sharding[1]} ranks"
