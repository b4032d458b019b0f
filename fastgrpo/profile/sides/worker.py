"""The process of one of our sides: the trainer takes a step on request.

usage: python -m fastgrpo.profile.sides.worker ours|plain|paper TRAINING-FLAGS…
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from fastgrpo_profiling.memory import MemoryProbe
from fastgrpo_profiling.watch import watch_forward
from fastgrpo_profiling.worker import TurnTaker, claim_stdout
from torch import nn
from transformers.utils import logging

from fastgrpo.cli.arguments import parse
from fastgrpo.profile.sides.start import build_trainer
from fastgrpo.scoring.advantages import Advantages
from fastgrpo.training.live_figures import trained_part, work_of
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import PromptBatch, ScoredRollout


class TurnTakingTrainer(GRPOTrainer):
    """Waits for a request before each step."""

    turns: TurnTaker

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.turns.next_step()
        return super().get_batch_samples(*args, **kwargs)

    def note_rollout(self, batch: PromptBatch, groups: Sequence[ScoredRollout], advantages: Advantages) -> None:
        super().note_rollout(batch, groups, advantages)
        work, trained = work_of(groups), trained_part(self.slices[0], self.config.beta)
        reward = advantages.rewards.nanmean().item()
        self.turns.note(tokens=work.completion_tokens, reward=reward, work=work, trained=trained)


def watch_generation(model: nn.Module, stack: ExitStack) -> None:
    """Splits HF `generate` into vision, prefill and decode, by what its forward calls are given.

    A rollout runs in evaluation mode and without gradients; the update has spans of its own.
    """

    def of_rollout(name: str) -> Any:
        return lambda module, args, kwargs: None if torch.is_grad_enabled() or model.training else name

    def pass_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled() or model.training:
            return None
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        return "rollout/prefill" if tokens is not None and tokens.shape[1] > 1 else "rollout/decode"

    stack.enter_context(watch_forward(model, pass_of))
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "visual":
            stack.enter_context(watch_forward(module, of_rollout("rollout/vision")))


def main(argv: Sequence[str]) -> None:
    """Takes a step on each request, until standard input ends."""
    answers = claim_stdout()
    logging.disable_progress_bar()
    config, script = parse(argv[1:])
    trainer = build_trainer(argv[0], config, script, TurnTakingTrainer)
    assert isinstance(trainer, TurnTakingTrainer)
    device = trainer.accelerator.device.type
    trainer.turns = TurnTaker(sys.stdin, answers, device)
    held = MemoryProbe(device).now()
    trainer.turns.introduce(held_bytes=held, threads=torch.get_num_threads(), version=torch.__version__)
    with ExitStack() as stack:
        watch_generation(trainer.model, stack)
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1:])
