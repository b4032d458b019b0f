"""The LM head's log-probs and the loss beside plain torch and the peers that are installed."""

from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from bench_kernels import bench_shapes, measure_floors
from harness import Result
from kernel_ops import OURS, VOCABULARY, Op, head_op, loss_op, ops_of, sides_of

from stages import Task, costs_only


def run(task: Task) -> Iterator[Result]:
    """Forward and backward at a step's size."""
    device = task.device
    if task.scale == "full":
        ops = [head_op(16_384, 1536, VOCABULARY, torch.bfloat16, device), loss_op(65_536, device)]
    else:
        ops = [op for op in ops_of(device, "tiny") if op.name in ("head", "loss")]
    yield from timed(Result("head", device), ops, task.scale)


def timed(result: Result, ops: Sequence[Op], scale: str) -> Iterator[Result]:
    """Checks and times each op; without torch.compile, whose compilation takes longer than all the rest."""
    rounds = 5 if scale == "full" else 2
    floors = measure_floors(result.device, "full" if scale == "full" else "tiny", rounds)
    options = Namespace(device=result.device, scale=scale, rounds=rounds, peaks=result.device == "cuda")
    result.figures |= {"floors": floors, "left_out": {"compile": "takes long to compile"}}
    for name in dict.fromkeys(op.name for op in ops):
        sides, left_out = sides_of(name, result.device)
        result.figures["left_out"] |= left_out
        kept = (*OURS, "torch") if scale == "smoke" else tuple(side.name for side in sides if side.name != "compile")
        sides = [side for side in sides if side.name in kept]
        with costs_only(result, name):
            bench_shapes(result, [op for op in ops if op.name == name], sides, floors, options)
        yield result
