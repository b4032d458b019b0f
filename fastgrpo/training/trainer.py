"""`GRPOTrainer`: transformers' Trainer, one of whose steps is one whole GRPO step.

Everything around the step (optimizer, schedule, clipping, logging, checkpoints, distribution) is transformers' and
accelerate's. What is GRPO stands in `GRPOTrainer.training_step`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from fastgrpo_profiling import span
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from fastgrpo.config import GRPOConfig
from fastgrpo.data.prompts import PromptBuilder, PromptCollator
from fastgrpo.data.row_dataset import warn_of_shared_rows
from fastgrpo.data.row_order import RolloutLoader, RolloutSampler
from fastgrpo.scoring.advantages import Advantages, group_advantages, nan_std
from fastgrpo.scoring.rewards import RewardFunction, resolve_reward_functions, reward_name, score
from fastgrpo.training.checkpoints import find_checkpoint, load_state
from fastgrpo.training.live_figures import LiveFigures
from fastgrpo.training.metrics import rollout_metrics, update_metrics
from fastgrpo.training.progress import ProgressDisplay, StepTrace
from fastgrpo.training.run_log import RunLog, completion_rows
from fastgrpo.training.setup import (
    build_engine,
    build_updater,
    build_vision_cache,
    one_step_per_batch,
    require_a_good_row,
    resolve_model,
    resolve_processing,
    resolve_reward_weights,
    resolve_rows,
    sampling_params,
)
from fastgrpo.training.timed_steps import TimedSteps
from fastgrpo.training.whole_checkpoints import WholeCheckpoints
from fastgrpo.types import PromptBatch, Rollout, ScoredRollout, TrainingGroup, UpdateResult
from fastgrpo.update.kl_reference import ReferenceSync, copy_reference, load_reference, place_reference, save_reference
from fastgrpo.update.plan import plan_updates, token_masks

logger = logging.get_logger(__name__)

LATEST = ("num_tokens", "skipped_rows", "learning_rate", "epoch")
"""Metrics of which a log line shows the latest value rather than the mean."""


class GRPOTrainer(TimedSteps, WholeCheckpoints):
    """Trains a vision-language (or text) model with GRPO. A drop-in for `trl.GRPOTrainer`.

    Args:
        model: a hub id or folder, a `PreTrainedModel`, or a `PeftModel`.
        reward_funcs: one or several; a built-in name (`accuracy`, `format`, `length`), `module:function`, or a
            callable with TRL's signature.
        args: settings.
        train_dataset: rows in the SAT or CV-Bench schema, or with a `prompt` (and `image` or `images`) column.
        eval_dataset: rows for `evaluate`, likewise.
        processing_class: tokenizer or processor; loaded from the model's folder when None.
        reward_processing_classes: accepted where TRL has it; reward models are not supported yet, functions only.
        peft_config: wraps the model in adapters; the reference of the KL term is then the model without them. That of
            a `PeftModel` with trained adapters is a copy of these.

    Raises:
        ValueError: a setting, a data set or a reward function that cannot work; the message says how to mend it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        if train_dataset is None:
            raise ValueError("train_dataset is missing: pass a data set of rows to train on.")
        if reward_processing_classes is not None:
            raise ValueError("reward_processing_classes: reward models are not supported yet; pass reward functions.")
        self.config = args or GRPOConfig()
        self.processing = resolve_processing(model, processing_class, self.config)
        model = resolve_model(model, self.config, peft_config)
        self.reward_functions: list[RewardFunction] = resolve_reward_functions(
            reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        )
        self.reward_weights = resolve_reward_weights(self.config, len(self.reward_functions))
        self.builder = PromptBuilder(
            self.processing.tokenizer,
            self.processing.image_processor,
            family=self.processing.family,
            mode=self.config.prompt_mode,
            template=self.config.prompt_template,
            max_prompt_length=self.config.max_prompt_length,
            chat_template_kwargs=self.config.template_kwargs,
        )
        rows = resolve_rows(train_dataset, "train_dataset", self.config, self.reward_functions)
        require_a_good_row(rows, self.builder)
        if eval_dataset is not None:
            eval_dataset = resolve_rows(eval_dataset, "eval_dataset", self.config, self.reward_functions)
            warn_of_shared_rows(rows, eval_dataset)
        self.reference_model = copy_reference(model, self.config)

        super().__init__(
            model=model,
            args=one_step_per_batch(self.config, model),
            data_collator=PromptCollator(rows, self.builder),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=self.processing,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for shown_by_trainer in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown_by_trainer)
        self.display = ProgressDisplay(self.config)
        self.add_callback(self.display)
        if self.config.profiled_steps:
            self.add_callback(StepTrace(Path(self.config.output_dir), self.config.profiled_steps))
        if self.reference_model is not None:
            self.reference_model = place_reference(self.reference_model, self.config, self.accelerator)
            if self.config.sync_ref_model:
                self.add_callback(ReferenceSync(self.reference_model, self.config))
        self.vision_cache = build_vision_cache(self.model, self.config)
        self.updater = build_updater(self.model, self.reference_model, self.config, self.accelerator, self.vision_cache)
        self.engine = build_engine(
            self.model,
            self.processing.tokenizer,
            self.config,
            self.accelerator,
            vision_cache=self.vision_cache,
        )
        self.live_figures = LiveFigures(self.model, self.config, self.accelerator.device.type)
        self.run_log = RunLog(Path(self.config.output_dir)) if self.is_world_process_zero() else None
        self.updates: list[list[TrainingGroup]] = []
        """The optimizer steps still to take on the last rollout."""
        self.skipped_rows = 0
        self._named_rows: set[int] = set()
        self.step_metrics: dict[str, float] = {}
        """Of the step under way."""
        self.extra_columns: dict[str, list[Any]] = {}
        """What reward functions add to the completions log (`log_extra`), a value per completion."""
        self.window: dict[str, list[float]] = defaultdict(list)
        """Each metric since the last log line."""
        self._drawn_tokens = 0
        self._save_is_due = False

    # The GRPO step

    def training_step(self, model: nn.Module, inputs: PromptBatch, num_items_in_batch: Any = None) -> Tensor:
        """One optimizer step up to its gradients; transformers then clips, steps and schedules."""
        self.updater.model = model
        model.train()  # checkpointing and dropout ask for it; a loaded model starts in eval mode
        if not self.updates:
            groups = self.score(self.generate(inputs))
            with span("advantages"):
                advantages = self.advantages(groups)
            with span("update/plan"):
                self.updates = self.plan_updates(groups, advantages)
            with span("log"):
                self.note_rollout(inputs, groups, advantages)
        self.live_figures.trains_on(self.updates[0])
        result = self.updater.accumulate(self.updates.pop(0))
        with span("update/metrics"):
            self.note_update(result)
        return result.loss * self.accelerator.num_processes  # transformers logs the mean over ranks

    def generate(self, batch: PromptBatch) -> list[Rollout]:
        """G completions for each prompt, in the batch's order."""
        with span("rollout"):
            self.engine.sync()
            size, params = self.config.num_generations, sampling_params(self.config)
            groups = self.engine.generate(batch.prompts, size, params, step=self.state.global_step)
            order = {prompt.row_id: i for i, prompt in enumerate(batch.prompts)}
            return sorted(groups, key=lambda group: order[group[0].row_id])

    def score(self, groups: Sequence[Rollout]) -> list[ScoredRollout]:
        """What every reward function says of every completion."""
        with span("reward"):
            rewards = score(
                groups,
                self.reward_functions,
                trainer_state=self.state,
                log_extra=self.extra_columns.__setitem__,
                log_metric=self._log_reward_metric,
            )
        per_group = rewards.split(self.config.num_generations)
        return [ScoredRollout(*group, columns) for group, columns in zip(groups, per_group, strict=False)]

    def advantages(self, groups: Sequence[ScoredRollout]) -> Advantages:
        """Group-relative advantages."""
        rewards = torch.cat([torch.zeros(0, len(self.reward_functions)), *(group.rewards for group in groups)])
        size, scale, batch_std = self.config.num_generations, self.config.scale_rewards, None
        if scale == "batch":
            mine = group_advantages(rewards, size, self.reward_weights, "none").rewards
            batch_std = nan_std(torch.tensor(gather_object(mine.tolist()), dtype=torch.float64))
        return group_advantages(rewards, size, self.reward_weights, scale, batch_std=batch_std)

    def plan_updates(self, groups: Sequence[ScoredRollout], advantages: Advantages) -> list[list[TrainingGroup]]:
        """The optimizer steps to take on a rollout."""
        masks = token_masks(groups, self.config)
        tokens = sum(int(mask.sum()) for mask in masks)
        totals = torch.tensor([len(masks), tokens], device=self.accelerator.device)
        total_sequences, total_tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
        steps = plan_updates(
            groups,
            advantages.advantages,
            masks,
            self.config,
            total_sequences=total_sequences,
            total_tokens=total_tokens,
            world_size=self.accelerator.num_processes,
        )
        if self.config.batch_plan.updates_per_rollout > 1:
            with span("update/old_logprobs"):
                steps = [
                    [replace(g, old_logprobs=old) for g, old in zip(step, self.updater.logprobs(step), strict=True)]
                    for step in steps
                ]
        return steps * self.config.num_iterations

    # What is written down

    def note_rollout(self, batch: PromptBatch, groups: Sequence[ScoredRollout], advantages: Advantages) -> None:
        """Metrics and the completions log of a fresh rollout, all ranks together."""
        names = [reward_name(function) for function in self.reward_functions]
        rows = completion_rows(
            groups, names, advantages, thumbnails=self.config.log_multimodal, extra=self.extra_columns
        )
        self.extra_columns.clear()
        skipped = [(row.row_id, row.reason) for row in batch.skipped]
        rows, skipped = gather_object(rows), gather_object(skipped)
        self.skipped_rows += len(skipped)
        self.state.num_input_tokens_seen += sum(row["length"] + row["prompt_length"] for row in rows)
        self.step_metrics |= rollout_metrics(rows, names)
        if self.run_log:
            for row_id, reason in skipped:
                if row_id not in self._named_rows:  # it comes again each epoch
                    self._named_rows.add(row_id)
                    logger.warning(f"row {row_id} skipped: {reason}")
            self.display.print_completions(rows)
            if self.config.log_completions:
                self.run_log.completions(self.state.global_step + 1, rows)
        self._drawn_tokens = sum(row["length"] for row in rows)
        self.live_figures.drew(groups)

    def note_update(self, result: UpdateResult) -> None:
        """Metrics of an update."""
        self.step_metrics |= update_metrics(result, self.config.beta, self.accelerator)
        self.step_metrics |= {
            "num_tokens": float(self.state.num_input_tokens_seen),
            "skipped_rows": float(self.skipped_rows),
        }

    def _log_reward_metric(self, name: str, value: Any) -> None:
        self.step_metrics[name] = float(value)  # may come as a tensor's or an array's

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Called by transformers when the optimizer has stepped (and once more at the end of an epoch)."""
        if "loss" in self.step_metrics:
            spans, seconds = self.end_step()
            metrics = {
                "epoch": self.state.epoch,
                **self.step_metrics,
                "grad_norm": 0.0 if grad_norm is None else float(grad_norm),
                "learning_rate": kwargs.get("learning_rate") or 0.0,
                "step_time": seconds,
                "tokens_per_second": self._drawn_tokens / seconds,
                **self.live_figures.of_step(spans, seconds),
            }
            self.step_metrics, self._drawn_tokens = {}, 0
            for name, value in metrics.items():
                self.window[name].append(value)
            with span("log"):
                self.display.show(self.state, metrics)
                if self.run_log:
                    self.run_log.metrics(self.state.global_step, metrics)
        # A checkpoint amid a rollout would have to hold its completions: wait for the rollout's last step.
        last = self.state.global_step >= self.state.max_steps
        self._save_is_due |= self.control.should_save
        self.control.should_save = self._save_is_due and (not self.updates or last)
        self._save_is_due &= not self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs carry the mean of every metric since the last one, the latest value of what adds up."""
        if "loss" in logs and self.window:
            logs |= {name: sum(values) / len(values) for name, values in self.window.items()}
            logs |= {name: self.window[name][-1] for name in LATEST if name in self.window}
            self.window.clear()
        super().log(logs, start_time)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains; `resume_from_checkpoint` (or the setting of that name) continues the same run, logs included."""
        resume = resume_from_checkpoint or self.config.resume_from_checkpoint
        checkpoint = find_checkpoint(resume, Path(self.config.output_dir))
        state = load_state(checkpoint)
        self.updates, self.step_metrics, self.skipped_rows = [], {}, state.get("skipped_rows", 0)
        if self.reference_model is not None and checkpoint is not None:
            load_reference(self.reference_model, checkpoint)
        self.window = defaultdict(list, state.get("window", {}))
        elsewhere = checkpoint is None or checkpoint.resolve().parent != Path(self.config.output_dir).resolve()
        if self.run_log and elsewhere:
            self.run_log.start_over()
        elif self.run_log:
            self.run_log.continue_after(state.get("step", 0))
        self.accelerator.wait_for_everyone()
        self.live_figures.measure_ceiling()
        try:
            return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            self.display.close()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # transformers takes a step too many on a finished run
            super()._run_epoch(*args, **kwargs)

    def state_to_save(self) -> dict[str, Any]:
        """What `train` needs, beside transformers' own state, to continue."""
        if self.run_log:
            self.run_log.sync()  # a checkpoint never knows of steps that the log lost
        return {"step": self.state.global_step, "skipped_rows": self.skipped_rows, "window": self.window}

    def save_more(self, folder: Path) -> None:
        """Beside `state_to_save`, a reference model that has moved."""
        if self.config.sync_ref_model and self.reference_model is not None and not self.args.save_only_model:
            save_reference(self.reference_model, folder)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Prompts stay on the host and every rank picks its own, so accelerate has nothing to prepare."""
        args, config = self.args, self.config
        sampler = RolloutSampler(
            len(self.train_dataset),
            config.batch_plan.prompts_per_rollout,
            repeats=config.batch_plan.updates_per_rollout,
            shuffle=config.shuffle_dataset,
            seed=config.seed if args.data_seed is None else args.data_seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return RolloutLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # a `PromptBatch` has no labels to count

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula knows neither sampling nor shared prompts."""
        return 0

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean rewards and lengths on `eval_dataset`, sampled as in training, under TRL's names."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ValueError("eval_dataset is missing: pass one to the trainer or to evaluate().")
        rows = resolve_rows(given, "eval_dataset", self.config, self.reward_functions)
        group_size = self.config.num_generations_eval or self.config.num_generations
        collate = PromptCollator(rows, self.builder)
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        names = [reward_name(function) for function in self.reward_functions]
        records: list[dict[str, Any]] = []
        self.engine.sync()  # all ranks together: one may have no rows
        for start in range(0, len(mine), self.args.per_device_eval_batch_size):
            chunk = mine[start : start + self.args.per_device_eval_batch_size]
            prompts = collate([rows[i] for i in chunk]).prompts
            drawn = list(self.engine.generate(prompts, group_size, sampling_params(self.config), step=start))
            rewards = score(drawn, self.reward_functions, trainer_state=self.state)
            groups = [ScoredRollout(*g, r) for g, r in zip(drawn, rewards.split(group_size), strict=False)]
            advantages = group_advantages(rewards, group_size, self.reward_weights, "none")
            records += completion_rows(groups, names, advantages, thumbnails=False)
        figures = rollout_metrics(gather_object(records), names)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
