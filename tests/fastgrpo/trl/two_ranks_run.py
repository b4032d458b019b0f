"""Streams, evaluation, a reward model and overridden rewards, on as many ranks as there are; run by test_two_ranks.py.

Usage: two_ranks_run.py MODEL_DIR JUDGE_DIR OUTPUT_DIR
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging

from fastgrpo.config import GRPOConfig
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams


class ScriptedEngine:
    """Completions that depend on the prompt alone."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        for prompt in prompts:
            yield Rollout(prompt, tuple(self.completion(prompt, index) for index in range(num_generations)))

    def sync(self) -> None:
        """It has no weights."""

    def completion(self, prompt: Prompt, index: int) -> Completion:
        draw = torch.Generator().manual_seed(int(prompt.input_ids.sum()) + index)
        ids = torch.randint(10, 300, (1 + int(torch.randint(1, 6, (), generator=draw)),), generator=draw)
        guess = torch.full((len(ids),), -5.0)
        return Completion(prompt.row_id, index, ids, f"text {int(ids[0])}", "stop", guess, guess)


class Doubled(GRPOTrainer):
    """Its rewards are those of all ranks, as TRL's `_calculate_rewards` gives them."""

    def _calculate_rewards(self, *given: Any) -> Any:
        rewards = super()._calculate_rewards(*given)
        assert len(rewards) >= len(given[1])
        return 2 * rewards


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    model, judge, output = sys.argv[1:]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = GRPOConfig(
        output_dir=output,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        num_generations=2,
        per_device_train_batch_size=8 // ranks,
        per_device_eval_batch_size=2 // ranks,
        max_completion_length=6,
        shuffle_dataset=False,
        optim="sgd",
        learning_rate=0.5,
        beta=0.1,
        scale_rewards="batch",
        max_steps=2,
        disable_tqdm=True,
    )
    rows = [{"prompt": f"Row number {i} is"} for i in range(6)]
    trainer = Doubled(
        model,
        [judge, "length"],
        config,
        Dataset.from_list(rows).to_iterable_dataset(),
        {"few": rows[:3], "many": rows[:5]},
    )
    trainer.engine = ScriptedEngine()
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(output, "evaluated.json").write_text(json.dumps(metrics))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
