"""The kernels: whether they are right, then how fast they are, beside plain torch and the peers that are installed."""

from collections.abc import Iterator, Sequence

from bench_kernels import Effort, bench_shapes, check_sides, measure_floors
from harness import Result, compute_dtype
from sides import OURS, Op
from sides.ops import decode_ops, odd_ops, step_ops

from stages import Task, costs_only


def kernels(task: Task) -> Iterator[Result]:
    """Each op beside plain torch in the same dtype, both against float64; an error of ours may be 1.1 times torch's.

    In bfloat16 on a GPU, where nothing else can check it.
    """
    result = Result("kernels", task.device)
    for op in odd_ops(task.device, task.scale, compute_dtype(task.device)):
        rows = {}
        with costs_only(result, f"{op.name} {op.shape}"):
            sides = [side for side in op.sides() if side.name in (*OURS, "torch")]
            rows, _ = check_sides(op, sides, op.make_inputs(), {})
        found = {name: {"errors": row.errors, "fault": row.fault} for name, row in rows.items()}
        result.figures.setdefault(op.name, {})[op.shape] = found
        result.checks |= {f"{op.name} {op.shape}: {name}": not rows[name].fault for name in OURS if name in rows}
        yield result


def head(task: Task) -> Iterator[Result]:
    """LM head and loss, forward and backward at a step's size."""
    yield from _timed(Result("head", task.device), step_ops(task.device, task.scale), task)


def decode(task: Task) -> Iterator[Result]:
    """What a decode step launches beside its matrix products, at a step's batch sizes; on a GPU in a CUDA graph."""
    scale = "full" if task.scale == "full" else "tiny"
    yield from _timed(Result("decode_ops", task.device), decode_ops(task.device, scale), task)


def _timed(result: Result, ops: Sequence[Op], task: Task) -> Iterator[Result]:
    """Without torch.compile, whose compilation takes longer than all the rest."""
    effort = Effort(task.device, task.scale, rounds=5 if task.scale == "full" else 2, peaks=task.device == "cuda")
    floors = result.figures["floors"] = measure_floors(task.device)
    for name in dict.fromkeys(op.name for op in ops):
        with costs_only(result, name):
            shapes = [op for op in ops if op.name == name]
            bench_shapes(result, shapes, floors, effort, lambda side: _is_wanted(side.name, task))
        yield result


def _is_wanted(side: str, task: Task) -> bool:
    return side in (*OURS, "torch") or (side != "compile" and task.scale != "smoke")
