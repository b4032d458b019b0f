"""The update's forward and backward pass: packed groups against the padded batch."""

from collections.abc import Iterator

from bench_update import build_model, measure
from harness import Result, print_table

from stages import Task, costs_only


def run(task: Task) -> Iterator[Result]:
    """Loss and every gradient agree, then times."""
    scale, device = task.scale, task.device
    result = Result("update", device)
    model = build_model(device)
    rows = []
    for name in ("ragged", "full") if scale != "smoke" else ("C=16",):
        with costs_only(result, name):
            row = measure(name, model, device, result, rounds={"full": 3, "tiny": 2, "smoke": 1}[scale], peaks=False)
            rows += [row] if row else []
        yield result
    print_table("Update, forward + backward", ["workload", "naive s", "packed s", "times faster"], rows)
