"""Trains twice on scripted completions, on as many ranks as there are; run by test_trainer.py, alone and by torchrun.

Usage: data_parallel_run.py MODEL_DIR OUTPUT_DIR
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from fastgrpo.config import GRPOConfig
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams

GLOBAL_BATCH = 4
"""Completions in a micro-batch over all ranks; two accumulated make a rollout of four prompts."""
CORRUPT = b"no picture"

SCENARIOS: dict[str, dict[str, Any]] = {
    "batch": {"loss_type": "dapo", "beta": 0.04, "scale_rewards": "batch", "max_steps": 3},
    "checkpointed": {"loss_type": "dapo", "gradient_checkpointing": True, "max_steps": 3},
    "plain": {"loss_type": "grpo", "beta": 0.04, "engine": "plain", "max_steps": 3},
    "reuse": {"loss_type": "grpo", "num_iterations": 2, "max_steps": 6, "mask_truncated_completions": True},
    # two rollouts a step
    "several": {"steps_per_generation": 1, "top_entropy_quantile": 0.5, "max_steps": 3},
}


class ScriptedEngine:
    """Completions that depend on the prompt alone, whatever batch it is in."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        for prompt in prompts:
            yield Rollout(prompt, tuple(self.completion(prompt.row_id, index) for index in range(num_generations)))

    def sync(self) -> None:
        """It has no weights."""

    def completion(self, row_id: int, index: int) -> Completion:
        draw = torch.Generator().manual_seed(100 * row_id + index)
        length = int(torch.randint(1, 7, (), generator=draw))
        token_ids = torch.randint(10, 300, (length,), generator=draw)
        guess = torch.full((length,), -5.0)
        return Completion(row_id, index, token_ids, "text", "length" if length == 6 else "stop", guess, guess)


def some_reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Differs from completion to completion; None now and then."""
    return [None if sum(ids) % 11 == 0 else float(sum(ids) % 5) for ids in completion_ids]


def rows() -> list[dict[str, Any]]:
    """Three rollouts of four. With two ranks, in turn: both kinds of rows on each, the other way round on the second;
    nothing but corrupt rows on the first; nothing but text on the first, nothing but pictures on the second."""
    picture, text = Image.new("RGB", (56, 84), "red"), None
    images = [picture, text, text, picture, CORRUPT, CORRUPT, picture, text, text, text, picture, picture]
    return [
        {"prompt": [{"role": "user", "content": f"What is {i} here?"}], "image": image}
        for i, image in enumerate(images)
    ]


def train(model_dir: str, output_dir: Path, name: str) -> None:
    """Leaves the trained model and the logs in OUTPUT_DIR/NAME."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = GRPOConfig(
        output_dir=str(output_dir / name),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        num_generations=2,
        per_device_train_batch_size=GLOBAL_BATCH // ranks,
        gradient_accumulation_steps=2,
        shuffle_dataset=False,
        max_completion_length=6,
        optim="sgd",
        learning_rate=0.5,
        disable_tqdm=True,
        **SCENARIOS[name],
    )
    trainer = GRPOTrainer(model=model_dir, reward_funcs=some_reward, args=config, train_dataset=rows())
    trainer.engine = ScriptedEngine()
    trainer.train()
    trainer.save_model()


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for name in SCENARIOS:
        train(sys.argv[1], Path(sys.argv[2]), name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
