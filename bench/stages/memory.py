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

from stages import Task, costs_only

HEAD = {"full": (32_768, 1536, VOCABULARY), "tiny": (256, 64, 8192), "smoke": (64, 32, 2000)}


def run(task: Task) -> Iterator[Result]:
    """Bytes above what was held before; where results are right."""
    scale, device = task.scale, task.device
    result = Result("memory", device)
    tokens, hidden_size, vocabulary = HEAD[scale]
    dtype = compute_dtype(device)
    small = head_op(min(tokens, 1024), hidden_size, vocabulary, dtype, device)
    sides = [side for side in small.sides() if side.name in (*OURS, "torch")]
    rows, _ = check_sides(small, sides, small.make_inputs(), {})
    result.checks |= {f"head: {name}": not row.fault for name, row in rows.items()}
    large = head_op(tokens, hidden_size, vocabulary, dtype, device)
    inputs = large.make_inputs()
    found: dict[str, int] = {}
    result.figures = {"logits_bytes": tokens * vocabulary * dtype.itemsize, "peak_bytes": found, "head": large.shape}
    for side in (side for side in sides if not rows[side.name].fault):
        with suppress(torch.OutOfMemoryError):  # plain torch's logits may fill the GPU
            found[f"head, {side.name}"] = peak_bytes(partial(side.run, inputs), device)
    del inputs
    yield result
    if scale != "smoke":
        for side in ("ours", "hf"):
            with costs_only(result, f"rollout, {side}"):
                found[f"rollout, {side}"] = bench_sampler.peak_memory(side, device)
        yield result
    with costs_only(result, "update"):
        found |= update_peaks(scale, device)
    # On a CPU a process reuses what it has freed, so small peaks say little.
    result.ratios = {
        f"{part}_memory": found[theirs] / found[ours]
        for part, ours, theirs in (
            ("head", f"head, {OURS[0]}", "head, torch"),
            ("rollout", "rollout, ours", "rollout, hf"),
            ("update", "update, packed", "update, naive"),
        )
        if device == "cuda" and ours in found and theirs in found
    }
    print_table("Peak memory", ["what", "MB"], [[name, peak / 1e6] for name, peak in found.items()])
    yield result


def update_peaks(scale: str, device: str) -> dict[str, int]:
    """Of both sides' updates, beyond weights and gradients."""
    found: dict[str, int] = {}
    model = bench_update.build_model(device)
    name = "full" if scale == "full" else "C=16"
    groups = bench_update.build_groups(bench_update.workloads(device)[name], model.config.get_text_config().vocab_size)
    for side, updater in bench_update.updaters(model, device).items():
        bench_update.step(model, updater, groups)  # gradients are there from here on
        call = partial(bench_update.step, model, updater, groups, keep_gradients=True)
        found[f"update, {side}"] = peak_bytes(call, device)
    return found
