"""What a decode step launches beside its matrix products: attention over pages, rotation, sampling."""

from collections.abc import Iterator

from harness import Result
from kernel_ops import decode_ops

from stages import Task
from stages.head import timed


def run(task: Task) -> Iterator[Result]:
    """Each op of one layer, and sampling, at a step's batch sizes; on a GPU in a CUDA graph, as a decode step is."""
    ops = decode_ops(task.device, "full" if task.scale == "full" else "tiny")
    yield from timed(Result("decode_ops", task.device), ops, task.scale)
