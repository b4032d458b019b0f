"""Run by test_zero3 on two ranks: rollouts of a policy whose parameters ZeRO-3 has partitioned.

The ranks differ in all that could make one wait for the other: how many prompts, how long, pictures on one rank only.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from fastgrpo.demo.base_model import load_tokenizer, tiny_model
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.types import Prompt, SamplingParams

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}

torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
rank = dist.get_rank()
model, same = tiny_model(seed=4), tiny_model(seed=4)
engine, plain = SamplerEngine(model, load_tokenizer()), SamplerEngine(same, load_tokenizer())
engine.model = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)[0]
for sampler in (engine, plain):
    sampler.sync()
length = 9 + 20 * rank
ids = torch.randint(10, 200, (length,), generator=torch.Generator().manual_seed(rank))
pixels, grid = None, None
if rank == 0:
    ids[1:5] = model.config.image_token_id
    pixels, grid = torch.linspace(-1, 1, 16 * 1176).view(16, 1176), torch.tensor([[1, 4, 4]])
prompts = [Prompt(row, ids, torch.arange(length).expand(3, -1), pixels, grid, "") for row in range(1 + rank)]
params = SamplingParams(10 + 20 * rank, temperature=0.7)
drawn, expected = (
    [c.token_ids.tolist() for _, group in e.generate(prompts, 2, params, 0) for c in group] for e in (engine, plain)
)
dist.barrier()
if drawn == expected:
    Path(sys.argv[1], f"rank{rank}").touch()
