"""`GRPOTrainer`: transformers' Trainer, one of whose steps is one whole GRPO step.

Everything around the step (optimizer, schedule, clipping, logging, checkpoints, distribution) is transformers' and
accelerate's. What is GRPO stands in `GRPOTrainer.take_step`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastgrpo_profiling import span
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from fastgrpo.config import GRPOConfig
from fastgrpo.data.prompts import PromptCollator
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.model.families import end_ids
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.plain.hf_generation import has_own_generate
from fastgrpo.scoring.advantages import Advantages
from fastgrpo.training.checkpoints import load_state
from fastgrpo.training.completion_records import distinct_names
from fastgrpo.training.completions_upload import CompletionsUpload
from fastgrpo.training.custom_rollout import CustomRollout
from fastgrpo.training.half_rollout import load_slices, save_slices
from fastgrpo.training.live_figures import LiveFigures
from fastgrpo.training.memory import memory_to_come
from fastgrpo.training.reward_evaluation import RewardEvaluation
from fastgrpo.training.rewards import load_reward_functions, place_reward_models, tell_of_late_calls
from fastgrpo.training.rows import (
    build_prompt_builder,
    require_a_good_row,
    resolve_held_out,
    resolve_rows,
    warn_of_known_rows,
)
from fastgrpo.training.setup import (
    build_engine,
    build_updater,
    build_vision_cache,
    default_output_dir,
    resolve_model,
    resolve_processing,
    resolve_processing_class,
    resolve_reward_weights,
    sampling_params,
    settle,
)
from fastgrpo.training.step_log import StepLog
from fastgrpo.training.tool_rollout import ToolRollout
from fastgrpo.training.tools import ToolBox
from fastgrpo.training.trl_surface import require_called_overrides
from fastgrpo.types import Engine, PromptBatch, Rollout, ScoredRollout, TrainingGroup
from fastgrpo.update.entropy import EntropyControl
from fastgrpo.update.kl_reference import ReferenceSync, copy_reference, load_reference, place_reference, save_reference
from fastgrpo.update.plan import plan_updates, reweighted, token_masks


class GRPOTrainer(RewardEvaluation):
    """Trains a vision-language (or text) model with GRPO. A drop-in for `trl.GRPOTrainer`.

    Args:
        model: a hub id or folder, a `PreTrainedModel`, or a `PeftModel`.
        reward_funcs: one or several; a built-in name (`accuracy`, `format`, `length`, or one of TRL's), an import path,
            a callable with TRL's signature, or a reward model: a hub id, a folder, a sequence classifier.
        args: settings; those of `output_dir` `MODEL-GRPO` when None.
        train_dataset: rows in the SAT or CV-Bench schema, or with a `prompt` (and `image` or `images`) column; a
            stream of such rows needs `max_steps`.
        eval_dataset: rows for `evaluate`, likewise; or several sets by name.
        processing_class: tokenizer or processor; loaded from the model's folder when None.
        reward_processing_classes: the tokenizers of reward models, in the order of `reward_funcs`.
        quantization_config: loads the model's weights with so many bits (bitsandbytes, on a GPU); train adapters then.
        peft_config: wraps the model in adapters; the reference of the KL term is then the model without them. That of
            a `PeftModel` with trained adapters is a copy of these.
        rollout_func: draws the completions instead of the sampler, see `custom_rollout`.
        tools: functions that the model may call.
        environment_factory: makes environments, whose methods it may call, one for each completion; see `ToolBox`.

    Raises:
        ValueError: a setting, a data set or a reward function that cannot work; the message says how to mend it.
    """

    config: GRPOConfig
    method = "grpo"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        require_called_overrides(type(self))
        self.config = args or GRPOConfig(default_output_dir(model))
        self.toolbox = ToolBox(tools, environment_factory)
        train_dataset = self.toolbox.with_prompts(train_dataset, self.config)
        owned = self.toolbox.reward_functions()
        self.reward_functions = load_reward_functions(reward_funcs, reward_processing_classes, self.config, owned)
        self.reward_names = distinct_names(self.reward_functions)
        self.reward_weights = resolve_reward_weights(self.config, len(self.reward_functions), len(owned))
        self.processing = resolve_processing(model, processing_class, self.config)
        model = resolve_model(model, self.config, peft_config, quantization_config)
        self.builder = build_prompt_builder(self.processing, self.config)
        self.builder.tools = self.toolbox.schemas
        self.rows = resolve_rows(train_dataset, self.config, self.reward_functions)
        require_a_good_row(self.rows, self.builder)
        self.held_out = resolve_held_out(eval_dataset, self.config, self.reward_functions)
        warn_of_known_rows(self.rows, self.held_out)
        self.reference_model = copy_reference(model, self.config)
        settle(self.config, model)

        super().__init__(
            model=model,
            data_collator=PromptCollator(self.rows, self.builder),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=resolve_processing_class(processing_class, self.processing),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        place_reward_models(self.reward_functions, self.accelerator.device)
        late = {
            "a subclass overrides how rewards are calculated": not self.calls_functions,
            "rollout_func returns them together": rollout_func is not None,
            "completions that call tools end together": bool(self.toolbox),
        }
        tell_of_late_calls(self.reward_functions, [reason for reason, holds in late.items() if holds])
        if self.config.log_completions_hub_repo is not None:
            self.add_callback(CompletionsUpload(Path(self.config.output_dir) / "completions", self.config))
        if self.reference_model is not None:
            self.reference_model = place_reference(self.reference_model, self.config, self.accelerator)
            if self.config.sync_ref_model:
                self.add_callback(ReferenceSync(self.reference_model, self.config))
        cache = build_vision_cache(self.model, self.config)
        self.updater = build_updater(self.model, self.reference_model, self.config, self.accelerator, cache)
        self.rollout_func = rollout_func
        self.engine = self.build_engine(cache)
        figures = LiveFigures(self.model, self.config, self.accelerator.device.type)
        self.step_log = StepLog(self.config, self.reward_names, self.accelerator, figures, self.run_log, self.display)
        self.entropy = EntropyControl(self.config, self.accelerator)
        self.slices: list[list[TrainingGroup]] = []
        """What is still to train on of the last rollout."""
        self.slices_lost = 0
        """Trained on before a resume, of a rollout that is drawn anew."""

    def build_engine(self, cache: VisionCache | None = None) -> Engine:
        """What draws completions from the model."""
        tokenizer = self.processing.tokenizer
        sampler = build_engine(
            self.model,
            tokenizer,
            self.config,
            self.accelerator,
            cache,
            memory_to_come=lambda: memory_to_come(self.model, self.optimizer),
        )
        if self.rollout_func is not None:
            return CustomRollout(self.rollout_func, self, sampler, self.builder)
        if not self.toolbox:
            return sampler
        most = self.config.max_tool_calling_iterations
        return ToolRollout(self.toolbox, sampler, self.builder, end_ids(self.model, tokenizer), most)

    # The GRPO step

    def take_step(self, model: nn.Module, batches: list[PromptBatch]) -> Tensor:
        """One optimizer step up to its gradients; transformers then clips, steps and schedules."""
        self.updater.model = model
        groups: list[TrainingGroup] = []
        for batch in batches[:: self.config.batch_plan.micro_batches_per_slice]:
            if not self.slices:
                rollouts = self.score(self.generate(batch))
                advantages = self.advantages(rollouts)
                self.slices = self.plan_updates(rollouts, advantages)[self.slices_lost :]
                self.slices_lost = 0
                self.note_rollout(batch, rollouts, advantages)
            groups += self.slices.pop(0)
        return self.update(reweighted(groups, self.config.batch_plan.accumulation / len(batches)))

    def generate(self, batch: PromptBatch) -> list[Rollout]:
        """G completions for each prompt, in the batch's order."""
        with span("rollout"):
            self.engine.sync()
            size, params = self.config.num_generations, sampling_params(self.config)
            drawn = self.engine.generate(batch.prompts, size, params, step=self.state.global_step)
            rollouts = self.drawn(drawn, batch.prompts)
            order = {prompt.row_id: i for i, prompt in enumerate(batch.prompts)}
            return sorted(rollouts, key=lambda rollout: order[rollout.prompt.row_id])

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """What every reward function says of every completion, and the reference, while `per_group` functions run."""
        known = self.updater.with_reference(rollouts, token_masks(rollouts, self.config))
        with span("reward"):
            rewards = self.rewards_of(rollouts)
        per_rollout = rewards.split(self.config.num_generations)
        return [ScoredRollout(*rollout, columns) for rollout, columns in zip(known, per_rollout, strict=False)]

    def advantages(self, rollouts: Sequence[ScoredRollout]) -> Advantages:
        """Group-relative advantages."""
        with span("advantages"):
            rewards = torch.cat([torch.zeros(0, len(self.reward_functions)), *(r.rewards for r in rollouts)])
            return self.advantages_of(rewards, self.config.num_generations)

    def plan_updates(self, rollouts: Sequence[ScoredRollout], advantages: Advantages) -> list[list[TrainingGroup]]:
        """The slices of a rollout to train on, of which an optimizer step takes one or more (`BatchPlan`)."""
        with span("update/plan"):
            masks = token_masks(rollouts, self.config)
            totals = torch.tensor([len(masks), sum(int(mask.sum()) for mask in masks)], device=self.accelerator.device)
            total_sequences, total_tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
            slices = plan_updates(
                rollouts,
                advantages.advantages,
                masks,
                self.config,
                total_sequences=total_sequences,
                total_tokens=total_tokens,
                world_size=self.accelerator.num_processes,
            )
        plan = self.config.batch_plan
        if not plan.is_on_policy:
            with span("update/old_logprobs"):
                slices = [
                    [replace(g, old_logprobs=old) for g, old in zip(one, self.updater.logprobs(one), strict=True)]
                    for one in slices
                ]
        return slices * plan.num_iterations

    def update(self, groups: list[TrainingGroup]) -> Tensor:
        """Accumulates the gradients of one optimizer step; the loss."""
        with span("update/entropy"):
            groups = self.entropy.prepare(groups, self.updater, self.current_gradient_accumulation_steps)
        result = self.updater.accumulate(groups)
        with span("update/metrics"):
            self.has_gradients = self.step_log.update(groups, result, self.state, self.entropy.finish(result))
        return result.loss * self.accelerator.num_processes  # transformers logs the mean over ranks

    # What is written down

    def note_rollout(self, batch: PromptBatch, rollouts: Sequence[ScoredRollout], advantages: Advantages) -> None:
        """Metrics and the completions log of a fresh rollout, all ranks together."""
        with span("log"):
            accepted = getattr(self.engine, "accepted_per_step", None)
            self.step_log.rollout(batch, rollouts, advantages, self.state, accepted)

    # Resuming

    def restore(self, checkpoint: Path | None) -> None:
        """What is left to train on of a checkpoint's rollout; a reference and an entropy coefficient that had moved."""
        if self.config.engine == "fast" and has_own_generate(self.model):  # perhaps since the trainer was built
            self.engine = self.build_engine()
        state, plan = load_state(checkpoint), self.config.batch_plan
        self.slices = [] if checkpoint is None else self.load_slices(checkpoint)
        step = 0 if self.slices else state.get("step", 0)
        if isinstance(self.rows, RowDataset):  # every epoch begins with a rollout
            step %= math.ceil(len(self.get_train_dataloader()) / plan.accumulation)
        self.slices_lost = step * plan.slices_per_step % plan.slices_between_rollouts
        self.entropy.load(state.get("entropy", {}))
        if self.reference_model is not None and checkpoint is not None:
            load_reference(self.reference_model, checkpoint)

    def load_slices(self, checkpoint: Path) -> list[list[TrainingGroup]]:
        """What is left to train on of a checkpoint's rollout."""
        if not isinstance(self.rows, RowDataset):  # a stream's rows cannot be looked up: the rollout is drawn anew
            return []
        rows, rank, ranks = self.rows, self.accelerator.process_index, self.accelerator.num_processes
        return load_slices(checkpoint, rank, ranks, lambda ids: self.data_collator([rows[i] for i in ids]).prompts)

    def state_to_save(self) -> dict[str, Any]:
        return super().state_to_save() | ({"entropy": self.entropy.state()} if self.entropy.has_bonus else {})

    def save_more(self, folder: Path) -> None:
        """Beside `state_to_save`, a rollout that is half used, and a reference model that has moved."""
        if self.args.save_only_model:
            return
        save_slices(self.slices, folder, self.accelerator.process_index, self.accelerator.num_processes)
        if self.config.sync_ref_model and self.reference_model is not None and self.args.should_save:
            save_reference(self.reference_model, folder)
