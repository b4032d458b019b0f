"""Where our step sits in transformers' Trainer: everything that overrides it, private methods included.

transformers counts micro-batches: it fetches `gradient_accumulation_steps` of them, asks for a `training_step` of each,
then clips, steps and schedules. Here each is handed all of the step's batches, and the whole step is taken in the last
one's turn. So the settings are those the user passed.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import torch
from fastgrpo_profiling import SpanRecorder, SpanTotal, record, span
from fastgrpo_profiling.watch import watch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from fastgrpo.atomic_files import publish, remove
from fastgrpo.model.load import load_weights
from fastgrpo.settings.given import given
from fastgrpo.training.checkpoints import ASIDE, load_state, reading, rotate, save_state
from fastgrpo.training.manifest import write_manifest

logger = logging.get_logger(__name__)


class TimedSteps(Trainer):
    """Puts spans around what transformers does in a step, and sums up those of each. Changes nothing else."""

    _recording: tuple[ExitStack, SpanRecorder, float] | None = None
    """Of the step under way: its open recording, and when it began."""
    _watched: Optimizer | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; a step that is left half-way is recorded no further."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.end_recording()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Where a step begins: the loader may decode pictures in this process."""
        self.end_recording()
        block, start = ExitStack(), time.perf_counter()
        self._recording = block, block.enter_context(record()), start
        with span("data"):
            return super().get_batch_samples(*args, **kwargs)

    def end_recording(self) -> tuple[Mapping[str, SpanTotal], float] | None:
        """Ends the recording of the step under way: its spans by name, and its seconds. None between steps.

        On a GPU this waits for the step's last span, the optimizer's.
        """
        if self._recording is None:
            return None
        (block, recorder, start), self._recording = self._recording, None
        block.close()
        return recorder.totals, time.perf_counter() - start

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        kind, arguments = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
        with given(
            f"lr_scheduler_type={kind!r} takes no lr_scheduler_kwargs={arguments}", "Change them, or leave it out."
        ):
            return super().create_scheduler(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        with given(f"metric_for_best_model={self.args.metric_for_best_model!r}", "Name one of these."):
            return bool(super()._determine_best_metric(*args, **kwargs))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        told = f"optim={self.args.optim.value!r}, optim_args={self.args.optim_args!r} make no optimizer"
        with given(told, "Change them, or leave them out."):
            self._require_read_optim_args()
            optimizer = super().create_optimizer(*args, **kwargs)
        stepping = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the one of an earlier `train`
        if isinstance(stepping, Optimizer) and stepping is not self._watched:
            watch_optimizer(stepping, "update/optimizer")
            self._watched = stepping
        return optimizer

    def _require_read_optim_args(self) -> None:
        """Raises ValueError for a name in `optim_args` that makes no difference, whatever its value."""
        plain = copy(self.args)
        plain.optim_args = None
        for name in (part.split("=")[0].strip() for part in (self.args.optim_args or "").split(",") if part):
            named = copy(self.args)
            named.optim_args = f"{name}=?"
            try:
                is_read = self.get_optimizer_cls_and_kwargs(named) != self.get_optimizer_cls_and_kwargs(plain)
            except Exception:  # so the value is looked at, or this optimizer needs the model
                continue
            if not is_read:
                raise ValueError(f"this optimizer reads no {name!r}.")

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with span("update/clip"):
            return super()._clip_grad_norm(model)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with span("log"):
            super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)


class TransformersHooks(TimedSteps):
    """A Trainer whose step is a subclass's `take_step`, with checkpoints that are whole or absent."""

    has_gradients = True
    """Whether the step under way left any; a subclass's `take_step` says so."""
    current_gradient_accumulation_steps = 1
    """Micro-batches of the step under way; transformers sets it."""
    _saving_aside = False
    run_id = ""
    """The run that checkpoints say they belong to."""

    # What a subclass brings

    def take_step(self, model: nn.Module, batches: list[Any]) -> Tensor:
        """A whole optimizer step up to its gradients; the loss, as the mean over ranks shows it."""
        raise NotImplementedError

    def step_ended(
        self, *, grad_norm: float, learning_rate: float, spans: Mapping[str, SpanTotal], seconds: float
    ) -> None:
        """The optimizer has stepped: `state.global_step` is this step's number."""

    def state_to_save(self) -> dict[str, Any]:
        """What it keeps beside transformers' own state; read back with `checkpoints.load_state`."""
        return {}

    def save_more(self, folder: Path) -> None:
        """Writes what else it keeps, in files of its own; called on every rank."""

    def write_card(self, folder: Path) -> None:
        """Writes the card of a model that has just been saved; called on the main process."""

    # The step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """All of a step's batches for each of its micro-batches."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        return [batches] * len(batches), items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Nothing but in the last micro-batch's turn, in which ranks exchange gradients."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()  # checkpointing and dropout ask for it; a loaded model starts in eval mode
        loss = self.take_step(model, inputs)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            torch.accelerator.memory.empty_cache()
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula knows neither sampling nor shared prompts."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # prompts have no labels to count

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Called when the optimizer has stepped, and once more at the end of an epoch."""
        # Without gradients DeepSpeed takes no step, and gives the norm of the one before.
        grad_norm = float(grad_norm) if self.has_gradients and grad_norm is not None else 0.0
        if (step := self.end_recording()) is not None:
            spans, seconds = step
            rate = kwargs.get("learning_rate") or 0.0
            with span("log"):
                self.step_ended(grad_norm=grad_norm, learning_rate=rate, spans=spans, seconds=seconds)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # transformers takes a step too many on a finished run
            super()._run_epoch(*args, **kwargs)

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; settings.json has them in plain text
            self.write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours, where transformers would draft one before an upload."""
        if self.is_world_process_zero():
            self.write_card(Path(self.args.output_dir))

    # Checkpoints: written aside, renamed when they are on disk

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        aside = output_dir / ASIDE / name
        if self.args.should_save:
            remove(output_dir / ASIDE)  # what a killed save left
        self.accelerator.wait_for_everyone()
        self._saving_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_aside = False
        self.save_more(aside)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(aside / "trainer_state.json"))
            save_state(aside, {**self.state_to_save(), "sharding": self._sharding()})
            write_manifest(aside, self.run_id)
            publish(aside, output_dir / name)
            remove(output_dir / ASIDE)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(output_dir / name))
            rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
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
        with reading(resume_from_checkpoint):
            if model is None and isinstance(self.model, PreTrainedModel):
                load_weights(self.model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _named(sharding: list[int] | None) -> str:
    return "no DeepSpeed" if sharding is None else f"ZeRO stage {sharding[0]} on {sharding[1]} ranks"
