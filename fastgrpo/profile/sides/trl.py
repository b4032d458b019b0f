"""TRL's side of a comparison, run in the environment that has TRL: its GRPOTrainer takes a step on request.

usage: python -m fastgrpo.profile.sides.trl [--check FOLDER] TRAINING-FLAGS…

It reads the flags, the data and the rewards that `fastgrpo train` would, and asks the same rows in the same order.
With --check it takes FOLDER/batch.safetensors through TRL's loss instead of training, for the gate.
"""

import fastgrpo.profile.sides.trl_on_cpu  # noqa: F401  isort: skip

import copy
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from fastgrpo_profiling import span
from fastgrpo_profiling.memory import MemoryProbe
from fastgrpo_profiling.watch import watch_forward
from fastgrpo_profiling.worker import TurnTaker, claim_stdout
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.utils import logging

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.assembly import load_model, load_training_rows
from fastgrpo.cli.run_arguments import ScriptArguments
from fastgrpo.config import GRPOConfig
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_order import RolloutSampler
from fastgrpo.model.load import load_processing
from fastgrpo.profile.gate import checkpoint_as_in_training
from fastgrpo.scoring.rewards import resolve_reward_functions
from fastgrpo.training.transformers_hooks import TimedSteps

# Renders a message's parts unchanged: our `PromptBuilder` has worded the prompts already.
VERBATIM = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SAME_NAMES = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2", "max_grad_norm", "max_steps"),
    *("seed", "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "num_iterations"),
    *("beta", "epsilon", "epsilon_high", "delta", "loss_type", "scale_rewards", "mask_truncated_completions"),
    *("repetition_penalty", "importance_sampling_level", "use_cpu", "logging_steps", "disable_tqdm", "reward_weights"),
    *("bf16", "fp16", "gradient_checkpointing", "output_dir"),
)
"""Settings that both trainers have under one name."""


class TurnTakingTrainer(TimedSteps, trl.GRPOTrainer):
    """Waits for a request before each step, and records TRL's methods as spans."""

    turns: TurnTaker

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.turns.next_step()
        return super().get_batch_samples(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with span("advantages"):  # what is left of it after the spans below
            output = super()._generate_and_score_completions(inputs)
        logged = self._metrics["train"]
        tokens = int(output["completion_mask"].sum())
        self.turns.note(tokens=tokens, reward=logged["reward"][-1])
        return output

    def _tokenize_prompts(self, *args: Any, **kwargs: Any) -> Any:
        with span("data/images"):
            return super()._tokenize_prompts(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with span("rollout/generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with span("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with span("update/forward" if torch.is_grad_enabled() else "update/reference_model"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with span("update/forward"):
            return super()._compute_loss(*args, **kwargs)


class RunData:
    """The data of a run as TRL takes them: our prompts, in the order our sampler draws them."""

    def __init__(self, config: GRPOConfig, script: ScriptArguments) -> None:
        self.processing = load_processing(script.model_name_or_path, script.min_pixels, script.max_pixels)
        builder = PromptBuilder(
            self.processing.tokenizer,
            self.processing.image_processor,
            family=self.processing.family,
            mode=config.prompt_mode,
            template=config.prompt_template,
            chat_template_kwargs=config.template_kwargs,
        )
        rows = load_training_rows(script, config.seed)
        sampler = RolloutSampler(
            len(rows),
            config.batch_plan.prompts_per_rollout,
            repeats=1,
            shuffle=config.shuffle_dataset,
            seed=config.seed if config.data_seed is None else config.data_seed,
            rank=0,
            world_size=1,
        )
        order = [i for batch in sampler for i in batch]
        self.rows = [self._trl_row(builder, rows.convert(*rows[i])) for i in order]

    def _trl_row(self, builder: PromptBuilder, row: Any) -> dict[str, Any]:
        prompt = builder.build(row)
        text = prompt.text.replace(builder.family.image_place, "", len(row.images))
        assert prompt.text == builder.family.image_place * len(row.images) + text, "TRL puts pictures first"
        return {"prompt": [{"role": "user", "content": text}], "images": row.images, **prompt.columns}

    def processor(self) -> Qwen2VLProcessor:
        """Our tokenizer and image processor as the joint processor that TRL wants."""
        tokenizer = copy.deepcopy(self.processing.tokenizer)
        tokenizer.padding_side = "left"
        return Qwen2VLProcessor(
            image_processor=self.processing.image_processor,
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=VERBATIM,
        )


def trl_settings(config: GRPOConfig, **overrides: Any) -> trl.GRPOConfig:
    """The same settings in TRL's words: one micro-batch is the whole step, as it is for the padded batch."""
    settings = {name: getattr(config, name) for name in SAME_NAMES}
    settings["per_device_train_batch_size"] = config.batch_plan.completions_per_micro_batch
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    settings["steps_per_generation"] = config.batch_plan.micro_batches_per_rollout
    extra = {"report_to": "none", "save_strategy": "no", "shuffle_dataset": False, "log_completions": False}
    return trl.GRPOConfig(**{**settings, **extra, **overrides})


def build_trainer(config: GRPOConfig, script: ScriptArguments, **overrides: Any) -> TurnTakingTrainer:
    """TRL's trainer on the model, data and rewards of the flags."""
    data = RunData(config, script)
    return TurnTakingTrainer(
        model=load_model(config, script),
        reward_funcs=resolve_reward_functions(script.reward_funcs),
        args=trl_settings(config, **overrides),
        train_dataset=datasets.Dataset.from_list(data.rows),
        processing_class=data.processor(),
    )


def watch_generation(model: PreTrainedModel, stack: ExitStack) -> None:
    """Splits generation into vision, prefill and decode; the update and the frozen model have spans of their own."""
    generating = [False]
    generate = model.generate

    def flagged(*args: Any, **kwargs: Any) -> Any:
        generating[0] = True
        try:
            return generate(*args, **kwargs)
        finally:
            generating[0] = False

    def pass_of(module: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        name = "rollout/prefill" if tokens is not None and tokens.shape[1] > 1 else "rollout/decode"
        return name if generating[0] else None

    vision: Callable[..., str | None] = lambda *_: "rollout/vision" if generating[0] else None  # noqa: E731
    model.generate = flagged
    stack.enter_context(watch_forward(model, pass_of))
    stack.enter_context(watch_forward(model.model.visual, vision))


def train(config: GRPOConfig, script: ScriptArguments) -> None:
    """Takes a step on each request, until standard input ends."""
    answers = claim_stdout()
    trainer = build_trainer(config, script)
    device = trainer.accelerator.device.type
    trainer.turns = TurnTaker(sys.stdin, answers, device)
    backward = trainer.accelerator.backward

    def spanned_backward(*args: Any, **kwargs: Any) -> None:
        with span("update/backward"):
            backward(*args, **kwargs)

    trainer.accelerator.backward = spanned_backward
    held = MemoryProbe(device).now()
    trainer.turns.introduce(held_bytes=held, threads=torch.get_num_threads(), version=trl.__version__)
    with ExitStack() as stack:
        watch_generation(trainer.model, stack)
        trainer.train()


def check(folder: Path, config: GRPOConfig, script: ScriptArguments) -> None:
    """Loss and gradients of the batch in `folder`; writes answer.json and gradients.safetensors there."""
    batch = load_file(folder / "batch.safetensors")
    completions = [ids[:n].tolist() for ids, n in zip(batch["token_ids"], batch["lengths"].tolist(), strict=True)]
    trainer = build_trainer(config, script, loss_type="grpo")
    trainer.turns = TurnTaker(sys.stdin, sys.stdout, trainer.accelerator.device.type)
    trainer._generate_single_turn = lambda *_, **__: (completions, None)  # type: ignore[method-assign]
    group = config.num_generations
    rows = [row for row in trainer.train_dataset.select(range(len(completions) // group)) for _ in range(group)]
    trainer.model.train()
    if config.gradient_checkpointing:
        checkpoint_as_in_training(trainer.model)
    inputs = trainer._generate_and_score_completions(rows)
    inputs["advantages"] = batch["advantages"].to(inputs["advantages"])
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    save_file(
        {name: gradient.float().cpu().contiguous() for name, gradient in gradients.items()},
        folder / "gradients.safetensors",
    )
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    answer = {"loss": loss.item(), "prompt_ids": prompts[::group]}
    (folder / "answer.json").write_text(json.dumps(answer))


def main(argv: Sequence[str]) -> None:
    logging.disable_progress_bar()
    if argv[0] == "--check":
        check(Path(argv[1]), *parse(argv[2:]))
    else:
        train(*parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
