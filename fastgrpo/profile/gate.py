"""Compares two sides on a fixed batch (prompts, log-probs, loss, gradients) before either is timed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.training.setup import sampling_params
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import Completion, Prompt, TrainingGroup

MAX_PROMPTS = 2
"""Prompts of the fixed batch: two, so that an error that mixes groups shows."""
NEGLIGIBLE = 1e-3
"""A gradient whose norm is below this share of the whole gradient's is compared relative to that share: it is mostly
rounding error."""


class GateError(ValueError):
    """The sides compute different things, so a comparison of their times would mean nothing."""


@dataclass(frozen=True)
class Tolerances:
    """Largest differences that count as rounding error."""

    loss: float
    """Relative to the larger of the losses and 1e-3."""
    gradient: float
    """‖g − g'‖ / ‖g'‖, of every parameter."""
    mismatch: float
    """Mean |log-prob when drawn − log-prob in the update|, nats."""


FP32 = Tolerances(loss=1e-4, gradient=1e-3, mismatch=1e-3)
HALF = Tolerances(loss=3e-2, gradient=1e-1, mismatch=5e-2)
"""For bf16 and fp16, where the sides round in different places."""


@dataclass
class Gate:
    """The figures compared, and the limit of each."""

    figures: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, figure: float, limit: float) -> None:
        self.figures[name], self.limits[name] = figure, limit

    @property
    def failures(self) -> list[str]:
        """One line for each figure above its limit, or not a number."""
        return [
            f"{name} {figure:.3g} (at most {self.limits[name]:.3g})"
            for name, figure in self.figures.items()
            if not figure <= self.limits[name]
        ]

    def require(self) -> None:
        """Raises GateError if anything failed."""
        if self.failures:
            raise GateError(f"refused a timing: the sides do not do the same thing. {'; '.join(self.failures)}")


@dataclass(frozen=True)
class FixedBatch:
    """A batch with random advantages instead of ones from rewards, so that every completion has a gradient."""

    prompts: Sequence[Prompt]
    groups: Sequence[TrainingGroup]


def tolerances(config: Any, dtype: str) -> Tolerances:
    """The tolerances for the dtype that a run computes in."""
    return FP32 if not config.bf16 and not config.fp16 and dtype in ("float32", "auto") else HALF


def first_prompts(trainer: GRPOTrainer) -> list[Prompt]:
    """The first `MAX_PROMPTS` prompts of the first rollout."""
    return next(iter(trainer.get_train_dataloader())).prompts[:MAX_PROMPTS]


def draw_fixed_batch(trainer: GRPOTrainer) -> FixedBatch:
    """Draws completions of the first prompts with the trainer's engine; tokens are weighted as for loss_type grpo."""
    prompts = first_prompts(trainer)
    size = trainer.config.num_generations
    trainer.engine.sync()
    drawn = list(trainer.engine.generate(prompts, size, sampling_params(trainer.config), step=0))
    by_row = {prompt.row_id: tuple(map(_over_full_softmax, group)) for prompt, group in drawn}
    advantages = torch.randn(len(prompts), size, generator=torch.Generator().manual_seed(0))
    count = len(prompts) * size
    groups = [
        TrainingGroup(
            prompt,
            by_row[prompt.row_id],
            advantages[i],
            tuple(_weights(completion, count) for completion in by_row[prompt.row_id]),
            tuple(torch.ones(len(completion.token_ids), dtype=torch.bool) for completion in by_row[prompt.row_id]),
        )
        for i, prompt in enumerate(prompts)
    ]
    return FixedBatch(prompts, groups)


def _over_full_softmax(completion: Completion) -> Completion:
    """Replaces the log-probs of the distribution drawn from by those of the full softmax, which the update computes."""
    return replace(completion, sampling_logprobs=completion.logprobs)


def _weights(completion: Completion, count: int) -> Tensor:
    length = len(completion.token_ids)
    return torch.full((length,), 1 / (count * max(length, 1)))


@dataclass(frozen=True)
class Answer:
    """Our side's results on a batch. Gradients are on the host, so that a GPU need not hold both sides at once."""

    batch: FixedBatch
    loss: float
    mismatch: float
    gradients: Mapping[str, Tensor]


def answer_of(ours: GRPOTrainer) -> Answer:
    """Draws the fixed batch and takes loss, log-probs and gradients of it."""
    batch = draw_fixed_batch(ours)
    return Answer(batch, *loss_and_gradients(ours, batch))


def compare(answer: Answer, theirs: GRPOTrainer, limits: Tolerances) -> Gate:
    """Prompts, then loss, gradients and log-probs on the fixed batch."""
    gate = Gate()
    compare_prompts(gate, answer.batch.prompts, first_prompts(theirs))
    loss, _, gradients = loss_and_gradients(theirs, answer.batch)
    compare_update(gate, (answer.loss, answer.gradients), (loss, gradients), limits)
    gate.add("sampler against update, nats", answer.mismatch, limits.mismatch)
    return gate


def compare_prompts(gate: Gate, ours: Sequence[Prompt], theirs: Sequence[Prompt]) -> None:
    """Adds how many prompts differ."""
    pairs = zip(ours, theirs, strict=False)
    different = sum(not torch.equal(a.input_ids, b.input_ids) for a, b in pairs) + abs(len(ours) - len(theirs))
    gate.add("prompts that differ", different, 0)


def compare_update(
    gate: Gate,
    ours: tuple[float, Mapping[str, Tensor]],
    theirs: tuple[float, Mapping[str, Tensor]],
    limits: Tolerances,
) -> None:
    """Adds how far losses and gradients are apart."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    gate.add("loss", abs(loss - their_loss) / max(abs(loss), abs(their_loss), 1e-3), limits.loss)
    errors = gradient_errors(gradients, their_gradients)
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    gate.add(f"gradient of {worst}", errors[worst], limits.gradient)


def loss_and_gradients(trainer: GRPOTrainer, batch: FixedBatch) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, mean log-prob mismatch and every gradient of the policy on a batch, on the host; clears the gradients."""
    if trainer.args.gradient_checkpointing:
        checkpoint_as_in_training(trainer.model)
    trainer.updater.model = trainer.accelerator.prepare_model(trainer.model)
    result = trainer.updater.accumulate(batch.groups)
    gradients = {name: p.grad.float().cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    mismatch = result.mismatch.difference_sum / result.mismatch.token_count.clamp(min=1)
    return result.loss.item(), mismatch.item(), gradients


def checkpoint_as_in_training(model: Any) -> None:
    """Switches gradient checkpointing on, as transformers does, but keeps dropout off. A batch may not fit without."""
    # The older name is deprecated where the newer one exists.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()  # layers in evaluation mode are not checkpointed
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def gradient_errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Parameter → ‖g − g'‖ / ‖g'‖; a gradient that one side lacks is zero."""
    norm: Callable[[Tensor], float] = lambda gradient: torch.linalg.vector_norm(gradient).item()  # noqa: E731
    floor = NEGLIGIBLE * math.sqrt(sum(norm(gradient) ** 2 for gradient in theirs.values()))
    errors = {}
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        difference = norm(a - b) if a is not None and b is not None else norm(a if a is not None else theirs[name])
        errors[name] = difference / max(norm(b) if b is not None else 0.0, floor, 1e-30)
    return errors
