"""GRPO without the Trainer: the same engine, rewards, objective and updater in a loop of one's own.

usage: python docs/minimal_loop.py MODEL SAT.parquet STEPS
"""

import sys

import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder, PromptCollator
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.scoring.advantages import group_advantages
from fastgrpo.scoring.rewards import score
from fastgrpo.scoring.tagged import tagged_accuracy, tagged_format
from fastgrpo.training.setup import sampling_params
from fastgrpo.types import ScoredRollout
from fastgrpo.update.objective import loss_params
from fastgrpo.update.plan import plan_updates, token_masks
from fastgrpo.update.updater import PackedUpdater

path, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = GRPOConfig(batch_unit="prompts", per_device_train_batch_size=4, max_completion_length=48, report_to="none")
processing = load_processing(path)
model = load_policy(path)
rows = load_rows(data)
builder = PromptBuilder(processing.tokenizer, processing.image_processor, family=processing.family)
collate = PromptCollator(rows, builder)
updater = PackedUpdater(model, loss_params(config), token_budget=16_384)
engine = SamplerEngine(model, processing.tokenizer)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

for step in range(steps):
    batch = collate([rows[i % len(rows)] for i in range(4 * step, 4 * step + 4)])
    engine.sync()  # the sampler takes over the weights
    drawn = list(engine.generate(batch.prompts, config.num_generations, sampling_params(config), step))
    rewards = score(drawn, [tagged_accuracy, tagged_format])
    groups = [ScoredRollout(*group, r) for group, r in zip(drawn, rewards.split(config.num_generations), strict=True)]
    advantages = group_advantages(rewards, config.num_generations).advantages
    masks = token_masks(groups, config)
    totals = {"total_sequences": len(masks), "total_tokens": sum(len(mask) for mask in masks), "world_size": 1}
    for update in plan_updates(groups, advantages, masks, config, **totals):
        result = updater.accumulate(update)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {step}: loss {result.loss:.4f} reward {rewards.sum(dim=1).mean():.3f}")
