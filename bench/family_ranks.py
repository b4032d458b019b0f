"""A rollout and an update of tiny families on two ranks under ZeRO, compared with one process.

As a program, one of the ranks: torchrun … family_ranks.py OUTPUT_DIR STAGE:FAMILY…; leaves a file STAGE:FAMILY:RANK
with the largest relative error of a gradient, inf where the tokens are not those of one process.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from family_parity import draw, gradients, make_engine, training_groups
from fastgrpo_kernels import LossParams
from tiny_families import family

from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.update.updater import PackedUpdater


def ranks_errors(cases: Sequence[str], folder: Path) -> dict[str, float]:
    """Per case STAGE:FAMILY, the largest relative error of a gradient; inf where a rank failed or drew other tokens.
    `folder`: an empty one."""
    root = Path(__file__).parents[1]
    paths = [root, root / "kernels", root / "profiling", root / "bench"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    # gloo now and then aborts at tear-down, when all is done: the files count.
    run = subprocess.run([*command, str(folder), *cases], capture_output=True, text=True, env=environment, check=False)
    files = {case: [folder / f"{case}:{rank}" for rank in range(2)] for case in cases}
    if not all(file.exists() for pair in files.values() for file in pair):
        print(run.stderr[-3000:], file=sys.stderr)
    return {
        case: max(float(file.read_text()) if file.exists() else torch.inf for file in pair)
        for case, pair in files.items()
    }


def run(stage: int, name: str, accelerator: Accelerator) -> tuple[bool, float]:
    """Whether the tokens are those of one process, and the largest relative error of a gradient."""
    import deepspeed  # built by its first import, which tests without it must not ask for
    from deepspeed.utils import safe_get_full_grad

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
        Path(sys.argv[1], f"{case}:{accelerator.process_index}").write_text(str(error if same_tokens else torch.inf))
        dist.barrier()


if __name__ == "__main__":
    main()
