"""The update's forward and backward pass: packed groups against the padded batch."""

from collections.abc import Iterator

from bench_update import COLUMNS, measure, training_model
from harness import Result, print_table
from workloads import updates_of

from stages import Task, costs_only


def run(task: Task) -> Iterator[Result]:
    """Loss and every gradient agree, then times."""
    device, result, rows = task.device, Result("update", task.device), []
    model, rounds = training_model(device), {"full": 3, "tiny": 2, "smoke": 1}[task.scale]
    for name in ("ragged", "full") if task.scale != "smoke" else ("C=16",):
        with costs_only(result, name):
            rows += measure(name, updates_of(device)[name], model, device, result, rounds=rounds, peaks=False)
        yield result
    print_table("Update, forward + backward", COLUMNS[:4], rows)
