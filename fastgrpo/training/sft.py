"""`SFTTrainer`: supervised fine-tuning on the rows, through the packed forward pass, and in the run folder, of GRPO."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from fastgrpo_profiling import span
from fastgrpo_profiling.roofline import StepWork
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from fastgrpo.data.examples import ExampleBuilder, ExampleCollator
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_dataset import as_rows, warn_of_shared_rows
from fastgrpo.settings.sft_config import SFTConfig
from fastgrpo.training.live_figures import LiveFigures, patches_of
from fastgrpo.training.memory import memory_to_come
from fastgrpo.training.rows import require_a_good_row
from fastgrpo.training.run_trainer import RunTrainer
from fastgrpo.training.setup import (
    build_engine,
    build_supervised_updater,
    build_vision_cache,
    resolve_model,
    resolve_processing,
    settle,
)
from fastgrpo.training.step_log import StepLog
from fastgrpo.types import Engine, Example, ExampleBatch


class SFTTrainer(RunTrainer):
    """Fine-tunes a vision-language (or text) model on the answers of a data set.

    Args:
        model: a hub id or folder, a `PreTrainedModel`, or a `PeftModel`.
        args: settings.
        train_dataset: rows with an answer: in the SAT or CV-Bench schema, with `messages` that end in one, or a
            `prompt` or `question` beside a `completion`, `solution` or `answer`; and `image` or `images`.
        eval_dataset: rows for `evaluate`, likewise.
        processing_class: tokenizer or processor; loaded from the model's folder when None.
        peft_config: wraps the model in adapters.

    Raises:
        ValueError: a setting or a data set that cannot work; the message says how to mend it.
    """

    config: SFTConfig
    step_log: "SupervisedLog"
    method = "sft"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        if train_dataset is None:
            raise ValueError("train_dataset is missing: pass a data set of rows to train on.")
        self.config = args or SFTConfig()
        config = self.config
        self.processing = resolve_processing(model, processing_class, config)
        model = resolve_model(model, config, peft_config)
        self.builder = PromptBuilder(
            self.processing.tokenizer,
            self.processing.image_processor,
            family=self.processing.family,
            mode=config.prompt_mode,
            template=config.prompt_template,
            chat_template_kwargs=config.template_kwargs,
        )
        examples = ExampleBuilder(self.builder, train_on_prompt=config.train_on_prompt, max_length=config.max_length)
        self.rows = rows = as_rows(train_dataset, config.seed, name="train_dataset")
        require_a_good_row(rows, examples)
        if eval_dataset is not None:
            eval_dataset = as_rows(eval_dataset, config.seed, name="eval_dataset")
            warn_of_shared_rows(rows, eval_dataset)
        settle(config, model)
        super().__init__(
            model=model,
            data_collator=ExampleCollator(rows, examples),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=self.processing,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.vision_cache = build_vision_cache(self.model, config)
        self.updater = build_supervised_updater(self.model, config, self.accelerator, self.vision_cache)
        figures = LiveFigures(self.model, config, self.accelerator.device.type)
        self.step_log = SupervisedLog(config, (), self.accelerator, figures, self.run_log, self.display)

    @cached_property
    def engine(self) -> Engine:  # type: ignore[override]
        """For scores on held-out questions; it keeps weights of its own, so it is built when it is first asked for."""
        return build_engine(
            self.model,
            self.processing.tokenizer,
            self.config,
            self.accelerator,
            self.vision_cache,
            memory_to_come=lambda: memory_to_come(self.model, self.optimizer),
        )

    def restore(self, checkpoint: Path | None) -> None:
        """Frees the sampler of the scores before the run: training needs its memory."""
        self.__dict__.pop("engine", None)

    def take_step(self, model: nn.Module, batches: list[ExampleBatch]) -> Tensor:
        """One optimizer step up to its gradients: the mean cross-entropy of its targets, over all ranks."""
        batch = batches[0]  # the others are empty
        self.updater.model = model
        targets = self._over_ranks(torch.tensor(sum(len(example.targets) for example in batch.examples)))
        sums = self._over_ranks(self.updater.accumulate(batch.examples, int(targets)))
        loss, entropy = sums.tolist()
        self.has_gradients = bool(targets)
        with span("update/metrics"):
            self.step_log.examples(batch, self.state, loss=loss, entropy=entropy)
        return sums[0]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean cross-entropy and entropy of the targets in `eval_dataset`."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ValueError("eval_dataset is missing: pass one to the trainer or to evaluate().")
        rows = as_rows(given, self.config.seed, name="eval_dataset")
        collate = ExampleCollator(rows, self.data_collator.builder)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        at_once = self.config.per_device_eval_batch_size * ranks
        sums = torch.zeros(3, device=self.accelerator.device)  # all ranks run as many batches
        for start in range(0, len(rows), at_once):
            mine = range(start + rank, min(start + at_once, len(rows)), ranks)
            examples = collate([rows[i] for i in mine]).examples
            sums[:2] += self.updater.loss(examples)
            sums[2] += sum(len(example.targets) for example in examples)
        loss, entropy, targets = self._over_ranks(sums).tolist()
        if not targets:
            raise ValueError(f"none of the {len(rows)} rows of eval_dataset can be used")
        metrics = {f"{metric_key_prefix}_loss": loss / targets, f"{metric_key_prefix}_entropy": entropy / targets}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _over_ranks(self, values: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return summed


class SupervisedLog(StepLog):
    """A step's figures, of examples in the place of completions."""

    def examples(self, batch: ExampleBatch, state: TrainerState, *, loss: float, entropy: float) -> None:
        """The step's update. All ranks call it together."""
        tokens = gather_object([len(example.prompt.input_ids) + 1 for example in batch.examples])
        self.skip(batch.skipped)
        self._drawn_tokens = sum(tokens)
        state.num_input_tokens_seen += self._drawn_tokens
        self.figures.trains_on(work_of(batch.examples))
        self._step |= {"loss": loss, "num_tokens": float(state.num_input_tokens_seen)}
        self._step |= {"entropy": entropy} if tokens else {}


def work_of(examples: list[Example]) -> StepWork:
    """An update's work, counted as for prompts whose completions are the targets."""
    return StepWork(
        prompts=[len(example.prompt.input_ids) + 1 - len(example.targets) for example in examples],
        pictures=[patches for example in examples for patches in patches_of(example.prompt)],
        completions=[[len(example.targets)] for example in examples],
    )
