"""Run by test_update_of_families on two ranks: a rollout and an update of tiny families under ZeRO.

Usage: torchrun … family_ranks_run.py OUTPUT_DIR STAGE:FAMILY…; leaves a file STAGE:FAMILY:RANK where tokens and
gradients are those of one process.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_grad
from family_parity import draw, gradients, make_engine, training_groups
from fastgrpo_kernels import LossParams
from tiny_families import family

from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.update.updater import PackedUpdater


def run(stage: int, name: str, accelerator: Accelerator) -> tuple[bool, float]:
    """Whether the tokens are those of one process, and the largest relative error of a gradient."""
    rank = accelerator.process_index
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    (model, prompts), (same, _) = family(name), family(name)
    groups = training_groups(prompts)
    expected = gradients(same, PlainUpdater(same, LossParams(), micro_batch_size=1), groups)
    drawn = draw(make_engine(same), prompts, 2)
    sampler = make_engine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    sampler.model = engine
    sampler.sync()
    found = draw(sampler, prompts[:1] if rank == 0 else prompts[1:], 2)  # uneven, pictures too
    pairs = [pair for row, completions in found.items() for pair in zip(completions, drawn[row], strict=True)]
    updater = PackedUpdater(model, LossParams(), token_budget=40, accelerator=accelerator)
    updater.model = engine
    seen: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def noted_step() -> None:
        for name, parameter in model.named_parameters():
            seen[name] = safe_get_full_grad(parameter).float().clone()
        take_step()

    engine.step = noted_step
    updater.accumulate(groups[:1] if rank == 0 else groups[1:])
    floor = 0.01 * max(gradient.norm() for gradient in expected.values())
    off = [(seen[n] - g).norm() / max(g.norm(), floor) for n, g in expected.items()]
    return all(torch.equal(a.token_ids, b.token_ids) for a, b in pairs), float(max(off))


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for case in sys.argv[2:]:
        stage, name = case.split(":")
        same_tokens, error = run(int(stage), name, accelerator)
        if same_tokens and error < 1e-4:
            Path(sys.argv[1], f"{case}:{accelerator.process_index}").touch()
        else:
            print(case, accelerator.process_index, same_tokens, error, file=sys.stderr)
        dist.barrier()


main()
