"""Peaks: of the head's both ways of working, of a rollout, and of an update."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import bench_sampler
import bench_update
import torch
from bench_kernels import check_sides
from harness import Result, compute_dtype, print_table
from sides import OURS
from sides.head import head_op
from sides.ops import VOCABULARY
from timing import peak_bytes
from workloads import updates_of

from stages import Task, costs_only

HEAD = {"full": (32_768, 1536, VOCABULARY), "tiny": (256, 64, 8192), "smoke": (64, 32, 2000)}
COMPARED = {
    "head": (f"head, {OURS[0]}", "head, torch"),
    "rollout": ("rollout, ours", "rollout, hf"),
    "update": ("update, packed", "update, naive"),
}


def run(task: Task) -> Iterator[Result]:
    """Bytes above what was held before; where results are right."""
    scale, device, result = task.scale, task.device, Result("memory", task.device)
    found: dict[str, int] = {}
    result.figures["peak_bytes"] = found
    with costs_only(result, "head"):
        found |= head_peaks(result, scale)
    yield result
    for side in ("ours", "hf") if scale != "smoke" else ():
        with costs_only(result, f"rollout, {side}"):
            found[f"rollout, {side}"] = bench_sampler.peak_memory(side, device)
        yield result
    workload = updates_of(device)["full" if scale == "full" else "C=16"]
    for side in ("packed", "naive"):
        with costs_only(result, f"update, {side}"):
            found[f"update, {side}"] = bench_update.peak_of(side, workload, device)
        yield result
    # On a CPU a process reuses what it has freed, so small peaks say little.
    result.ratios = {
        f"{part}_memory": found[theirs] / found[ours]
        for part, (ours, theirs) in COMPARED.items()
        if device == "cuda" and ours in found and theirs in found
    }
    print_table("Peak memory", ["what", "MB"], [[name, peak / 1e6] for name, peak in found.items()])
    yield result


def head_peaks(result: Result, scale: str) -> dict[str, int]:
    """By side, of those that are right at fewer tokens; plain torch's logits may fill the GPU."""
    (tokens, hidden_size, vocabulary), device = HEAD[scale], result.device
    dtype, found = compute_dtype(device), {}
    small = head_op(min(tokens, 1024), hidden_size, vocabulary, dtype, device)
    sides = [side for side in small.sides() if side.name in (*OURS, "torch")]
    rows, _ = check_sides(small, sides, small.make_inputs(), {})
    result.checks |= {f"head: {name}": not row.fault for name, row in rows.items()}
    large = head_op(tokens, hidden_size, vocabulary, dtype, device)
    result.figures |= {"logits_bytes": tokens * vocabulary * dtype.itemsize, "head": large.shape}
    inputs = large.make_inputs()
    for side in (side for side in sides if not rows[side.name].fault):
        with suppress(torch.OutOfMemoryError):
            found[f"head, {side.name}"] = peak_bytes(partial(side.run, inputs), device)
    return found
