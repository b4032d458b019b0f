"""Takes three SGD steps with the packed updater on two ranks, under DDP and DeepSpeed; run by test_updater_ranks.py.

Usage: torchrun … packed_ranks_run.py MODEL_DIR OUTPUT_DIR SCENARIO…, or, for the reference in one process, plainly.
Leaves OUTPUT_DIR/SCENARIO.safetensors: the first step's gradients, and the parameters at the end.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_grad
from fastgrpo_kernels import LossParams
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastgrpo.data.prompts import image_digests
from fastgrpo.model.load import load_policy
from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import Completion, Prompt, TrainingGroup
from fastgrpo.update.updater import PackedUpdater

STEPS, LEARNING_RATE = 3, 0.2
PARAMS = LossParams(beta=0.04)
WORDS = 300
"""Token ids below this are plain ones."""


def group(row: int, words: int, picture: bool, lengths: Sequence[int], image: int, patch_dim: int) -> TrainingGroup:
    """Random tokens; a picture is one merged patch."""
    draw = torch.Generator().manual_seed(row)
    ids = torch.randint(10, WORDS, (words,), generator=draw)
    if picture:
        ids[1] = image
    pixels = torch.randn(4, patch_dim, generator=draw) if picture else None
    grid = torch.tensor([[1, 2, 2]]) if picture else None
    digests = image_digests(pixels, grid)
    prompt = Prompt(row, ids, torch.arange(words).expand(3, -1), pixels, grid, "", image_digests=digests)
    tokens = [torch.randint(10, WORDS, (n,), generator=draw) for n in lengths]
    guess = [torch.full((n,), -6.0) for n in lengths]
    return TrainingGroup(
        prompt,
        tuple(Completion(row, i, tokens[i], "", "stop", guess[i], guess[i]) for i in range(len(lengths))),
        torch.randn(len(lengths), generator=draw),
        tuple(torch.full((n,), 0.1) for n in lengths),
        tuple(torch.ones(n, dtype=torch.bool) for n in lengths),
        tuple(guess_i + torch.randn(len(guess_i), generator=draw) for guess_i in guess),
    )


def groups_of(rank: int, step: int, config: Any) -> list[TrainingGroup]:
    """Uneven in every way: pictures on both ranks, on the first alone, and nothing at all on the first."""
    vision = config.vision_config
    shared = (config.image_token_id, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    shapes = [
        [[(5, True, (3, 1, 4)), (7, False, (2, 2))], [(4, True, (5,))]],
        [[(5, True, (3, 2)), (9, True, (6, 1)), (4, False, (2, 3))], [(6, False, (4, 2))]],
        [[], [(3, False, (4,)), (8, True, (2, 7))]],
    ][step][rank]
    return [group(100 * step + 10 * rank + i, *shape, *shared) for i, shape in enumerate(shapes)]


def parameters(model: Any) -> dict[str, Tensor]:
    """Whole and in float32, gathered where they are in parts."""
    own = getattr(model, "module", model)
    with deepspeed.zero.GatheredParameters(list(own.parameters())):
        return {f"end.{name}": p.detach().float().cpu().clone() for name, p in own.named_parameters()}


def run_single(model: Any) -> dict[str, Tensor]:
    """The reference: all ranks' groups in one padded batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    reference = load_policy(sys.argv[1])
    updater = PlainUpdater(model, PARAMS, micro_batch_size=64, reference_model=reference)
    found = {}
    for step in range(STEPS):
        updater.accumulate([g for rank in range(2) for g in groups_of(rank, step, model.config)])
        if step == 0:
            found = {f"gradient.{name}": p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return found | parameters(model)


def run_ranks(model: Any, scenario: str, accelerator: Accelerator) -> dict[str, Tensor]:
    """`ddp`, or `zero1`, `zero2`, `zero3`; with `-bf16`, or `-frozen` (and a cache), or nothing behind it."""
    config, trained = model.config, {name: p for name, p in model.named_parameters() if p.requires_grad}
    reference = load_policy(sys.argv[1]).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if is_ddp := scenario.startswith("ddp"):
        engine: Any = DistributedDataParallel(model)
    else:
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": int(scenario[4]), "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": scenario.endswith("bf16")},
            "gradient_clipping": 0.0,  # 1.0 unless stated
            "zero_allow_untested_optimizer": True,
        }
        engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine.train()
        if scenario.endswith("bf16"):
            reference = reference.bfloat16()
    cache = VisionCache(vision_tower(model), 1 << 20) if scenario.endswith("frozen") else None
    updater = PackedUpdater(
        model, PARAMS, token_budget=12, reference_model=reference, accelerator=accelerator, vision_cache=cache
    )
    updater.model = engine
    found: dict[str, Tensor] = {}

    def note_gradients() -> None:
        if not found:
            for name, p in trained.items():
                gradient = p.grad if is_ddp else safe_get_full_grad(p)
                found[f"gradient.{name}"] = gradient.detach().float().clone()

    if not is_ddp:
        take_step = engine.step

        def noted_step() -> None:
            note_gradients()
            take_step()

        engine.step = noted_step
    for step in range(STEPS):
        groups = groups_of(accelerator.process_index, step, config)
        updater.logprobs(groups)  # uneven numbers of passes must not hang
        updater.accumulate(groups)
        if is_ddp:
            note_gradients()
            optimizer.step()
            optimizer.zero_grad()
    if cache is not None:  # of partitioned weights it keeps nothing
        assert (cache.hits > cache.misses > 0) == (scenario != "zero3-frozen"), (cache.hits, cache.misses)
    return found | parameters(engine)


def main() -> None:
    torch.set_num_threads(1)
    model_dir, output_dir, *scenarios = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    for scenario in scenarios:
        torch.manual_seed(0)
        model = load_policy(model_dir, freeze_vision=scenario.endswith("frozen"))
        found = run_single(model) if scenario.startswith("single") else run_ranks(model, scenario, accelerator)
        if accelerator.is_main_process:
            save_file(found, Path(output_dir) / f"{scenario}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
