"""`GRPOTrainer`: transformers' Trainer, one of whose steps is one whole GRPO step.

Everything around the step (optimizer, schedule, clipping, logging, checkpoints, distribution) is transformers' and
accelerate's. What is GRPO stands in `GRPOTrainer.take_step`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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

from fastgrpo.config import GRPOConfig
from fastgrpo.data.prompts import PromptCollator
from fastgrpo.data.row_dataset import warn_of_shared_rows
from fastgrpo.scoring.advantages import Advantages, group_advantages, nan_std
from fastgrpo.scoring.rewards import RewardFunction, resolve_reward_functions, score
from fastgrpo.training.checkpoints import find_checkpoint, load_state
from fastgrpo.training.completion_records import distinct_names
from fastgrpo.training.half_rollout import load_updates, save_updates
from fastgrpo.training.live_figures import LiveFigures
from fastgrpo.training.memory import memory_to_come
from fastgrpo.training.metrics import rollout_metrics
from fastgrpo.training.model_card import RunFacts, write_model_card
from fastgrpo.training.progress import ProgressDisplay, StepTrace
from fastgrpo.training.reward_evaluation import score_rows
from fastgrpo.training.run_log import RunLog
from fastgrpo.training.setup import (
    build_engine,
    build_loader,
    build_prompt_builder,
    build_updater,
    build_vision_cache,
    require_a_good_row,
    resolve_model,
    resolve_processing,
    resolve_reward_weights,
    resolve_rows,
    sampling_params,
    settle,
)
from fastgrpo.training.step_log import StepLog
from fastgrpo.training.transformers_hooks import TransformersHooks
from fastgrpo.types import PromptBatch, Rollout, ScoredRollout, TrainingGroup
from fastgrpo.update.kl_reference import ReferenceSync, copy_reference, load_reference, place_reference, save_reference
from fastgrpo.update.plan import plan_updates, token_masks


class GRPOTrainer(TransformersHooks):
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
        self.builder = build_prompt_builder(self.processing, self.config)
        rows = resolve_rows(train_dataset, "train_dataset", self.config, self.reward_functions)
        require_a_good_row(rows, self.builder)
        if eval_dataset is not None:
            eval_dataset = resolve_rows(eval_dataset, "eval_dataset", self.config, self.reward_functions)
            warn_of_shared_rows(rows, eval_dataset)
        self.reference_model = copy_reference(model, self.config)
        settle(self.config, model)

        super().__init__(
            model=model,
            args=self.config,
            data_collator=PromptCollator(rows, self.builder),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=self.processing,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for shown_by_trainer in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown_by_trainer)
        display = ProgressDisplay(self.config)
        self.add_callback(display)
        if self.config.profiled_steps:
            self.add_callback(StepTrace(Path(self.config.output_dir), self.config.profiled_steps))
        if self.reference_model is not None:
            self.reference_model = place_reference(self.reference_model, self.config, self.accelerator)
            if self.config.sync_ref_model:
                self.add_callback(ReferenceSync(self.reference_model, self.config))
        cache = build_vision_cache(self.model, self.config)
        self.updater = build_updater(self.model, self.reference_model, self.config, self.accelerator, cache)
        self.engine = build_engine(
            self.model,
            self.processing.tokenizer,
            self.config,
            self.accelerator,
            cache,
            memory_to_come=lambda: memory_to_come(self.model, self.optimizer),
        )
        self.reward_names = distinct_names(self.reward_functions)
        self.run_log = RunLog(Path(self.config.output_dir)) if self.is_world_process_zero() else None
        figures = LiveFigures(self.model, self.config, self.accelerator.device.type)
        self.step_log = StepLog(self.config, self.reward_names, self.accelerator, figures, self.run_log, display)
        self.updates: list[list[TrainingGroup]] = []
        """The optimizer steps still to take on the last rollout."""

    # The GRPO step

    def take_step(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        """One optimizer step up to its gradients; transformers then clips, steps and schedules."""
        self.updater.model = model
        if not self.updates:
            rollouts = self.score(self.generate(batch))
            advantages = self.advantages(rollouts)
            self.updates = self.plan_updates(rollouts, advantages)
            self.note_rollout(batch, rollouts, advantages)
        return self.update(self.updates.pop(0))

    def generate(self, batch: PromptBatch) -> list[Rollout]:
        """G completions for each prompt, in the batch's order."""
        with span("rollout"):
            self.engine.sync()
            size, params = self.config.num_generations, sampling_params(self.config)
            rollouts = self.engine.generate(batch.prompts, size, params, step=self.state.global_step)
            order = {prompt.row_id: i for i, prompt in enumerate(batch.prompts)}
            return sorted(rollouts, key=lambda rollout: order[rollout.prompt.row_id])

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """What every reward function says of every completion."""
        with span("reward"):
            rewards = score(
                rollouts,
                self.reward_functions,
                trainer_state=self.state,
                log_extra=self.step_log.log_extra,
                log_metric=self.step_log.log_metric,
                nan_rewards=self.config.nan_rewards,
            )
        per_rollout = rewards.split(self.config.num_generations)
        return [ScoredRollout(*rollout, columns) for rollout, columns in zip(rollouts, per_rollout, strict=False)]

    def advantages(self, rollouts: Sequence[ScoredRollout]) -> Advantages:
        """Group-relative advantages."""
        with span("advantages"):
            rewards = torch.cat([torch.zeros(0, len(self.reward_functions)), *(r.rewards for r in rollouts)])
            size, scale, batch_std = self.config.num_generations, self.config.scale_rewards, None
            if scale == "batch":
                mine = group_advantages(rewards, size, self.reward_weights, "none").rewards
                batch_std = nan_std(torch.tensor(gather_object(mine.tolist()), dtype=torch.float64))
            return group_advantages(rewards, size, self.reward_weights, scale, batch_std=batch_std)

    def plan_updates(self, rollouts: Sequence[ScoredRollout], advantages: Advantages) -> list[list[TrainingGroup]]:
        """The optimizer steps to take on a rollout."""
        with span("update/plan"):
            masks = token_masks(rollouts, self.config)
            totals = torch.tensor([len(masks), sum(int(mask.sum()) for mask in masks)], device=self.accelerator.device)
            total_sequences, total_tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
            steps = plan_updates(
                rollouts,
                advantages.advantages,
                masks,
                self.config,
                total_sequences=total_sequences,
                total_tokens=total_tokens,
                world_size=self.accelerator.num_processes,
            )
        plan = self.config.batch_plan
        if plan.updates_per_rollout > 1:
            with span("update/old_logprobs"):
                steps = [
                    [replace(g, old_logprobs=old) for g, old in zip(step, self.updater.logprobs(step), strict=True)]
                    for step in steps
                ]
        # A rollout drawn amid its place, where a checkpoint's could not be taken over, gets the steps that are left.
        return (steps * plan.num_iterations)[self.state.global_step % plan.updates_per_rollout :]

    def update(self, groups: list[TrainingGroup]) -> Tensor:
        """Accumulates the gradients of one optimizer step; the loss."""
        result = self.updater.accumulate(groups)
        with span("update/metrics"):
            self.has_gradients = self.step_log.update(groups, result, self.state)
        return result.loss * self.accelerator.num_processes  # transformers logs the mean over ranks

    # What is written down

    def note_rollout(self, batch: PromptBatch, rollouts: Sequence[ScoredRollout], advantages: Advantages) -> None:
        """Metrics and the completions log of a fresh rollout, all ranks together."""
        with span("log"):
            self.step_log.rollout(batch, rollouts, advantages, self.state)

    def step_ended(self, **of_step: Any) -> None:
        """Logs the step that has ended."""
        self.step_log.step_ended(self.state, **of_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs carry our metrics too."""
        if "loss" in logs:
            logs |= self.step_log.line()
        super().log(logs, start_time)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains; `resume_from_checkpoint` (or the setting of that name) continues the same run, logs included.

        Raises:
            ValueError: no such checkpoint, or another run is writing into the output folder.
        """
        with nullcontext() if self.run_log is None else self.run_log.lock.held():
            checkpoint = self.begin(resume_from_checkpoint or self.config.resume_from_checkpoint)
            try:
                return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
            finally:
                self.step_log.display.close()

    def begin(self, resume: str | bool | None) -> Path | None:
        """Clears the output folder, or cuts its logs back to the checkpoint that the run goes on from: returned."""
        output_dir = Path(self.config.output_dir)
        checkpoint = find_checkpoint(resume, output_dir)
        state = load_state(checkpoint)
        self.step_log.start(state)
        self.updates = [] if checkpoint is None else self.load_updates(checkpoint)
        if self.reference_model is not None and checkpoint is not None:
            load_reference(self.reference_model, checkpoint)
        if self.run_log is not None:
            if checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve():
                self.run_log.continue_after(state.get("step", 0))
            else:
                self.run_log.start_over()
            self.run_begins()
        self.accelerator.wait_for_everyone()
        self.step_log.figures.measure_ceiling()
        return checkpoint

    def run_begins(self) -> None:
        """For subclasses: the main process has cleared the output folder, or cut its logs back to the checkpoint."""

    def load_updates(self, checkpoint: Path) -> list[list[TrainingGroup]]:
        """What is left to train on of a checkpoint's rollout."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return load_updates(
            checkpoint, rank, ranks, lambda ids: self.data_collator([self.train_dataset[i] for i in ids]).prompts
        )

    def state_to_save(self) -> dict[str, Any]:
        """What `train` needs, beside transformers' own state, to continue."""
        if self.run_log is not None:
            self.run_log.sync()  # a checkpoint never knows of steps that the log lost
        return {"step": self.state.global_step, **self.step_log.state()}

    def save_more(self, folder: Path) -> None:
        """Beside `state_to_save`, a rollout that is half used, and a reference model that has moved."""
        if self.args.save_only_model:
            return
        save_updates(self.updates, folder, self.accelerator.process_index, self.accelerator.num_processes)
        if self.config.sync_ref_model and self.reference_model is not None and self.args.should_save:
            save_reference(self.reference_model, folder)

    def write_card(self, folder: Path, scores: Mapping[str, float | None] | None = None) -> None:
        """Writes README.md beside a saved model; `scores` are figures on held-out rows, by what they are."""
        if self.run_log is not None:
            run = RunFacts(self.model, self.config, self.reward_names, self.state.global_step)
            write_model_card(folder, run, self.run_log, scores or {})

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Prompts stay on the host and every rank picks its own, so accelerate has nothing to prepare."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return build_loader(self.train_dataset, self.data_collator, self.config, rank, ranks)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean rewards and lengths on `eval_dataset`, sampled as in training, under TRL's names."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ValueError("eval_dataset is missing: pass one to the trainer or to evaluate().")
        rows = resolve_rows(given, "eval_dataset", self.config, self.reward_functions)
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        self.engine.sync()  # all ranks together: one may have no rows
        rewards = self.reward_functions, self.reward_names, self.reward_weights
        records = score_rows(rows, mine, self.engine, self.builder, self.config, *rewards, state=self.state)
        figures = rollout_metrics(gather_object(records))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
