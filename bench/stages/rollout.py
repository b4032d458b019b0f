"""Rollouts by batch size, ours against HF `generate`, with and without CUDA graphs, beside a decode step's floor."""

from collections.abc import Iterator
from dataclasses import replace

from bench_sampler import COLUMNS, Timed, are_right, floor_ms, logprob_errors, without_graphs
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, compute_dtype, print_table
from sides.rollout import build_engine
from workloads import SMALL, Workload, build_model, rollouts_of

from stages import Task, costs_only

WITHOUT_GRAPHS = "B=64"
"""The batch that is also decoded without CUDA graphs, which takes long."""


def run(task: Task) -> Iterator[Result]:
    """Log-probs against a forward pass in a wider dtype; then times, ours before HF's."""
    device, result, rows = task.device, Result("rollout", task.device), []
    workloads = workloads_of(task)
    smallest = next(iter(workloads.values()))
    model = build_model(smallest.model, device)
    engine = build_engine(model)
    errors = result.figures["logprob_errors"] = logprob_errors(model, engine, smallest)
    result.checks["log-probs are right"] = are_right(errors)
    if not result.passed:
        print(f"Not timed: log-probs {errors['ours']:.2g} nats off, HF's own {errors['hf']:.2g}")
        yield result
        return
    bandwidth = measure_ceilings(device, compute_dtype(device)).bytes_per_s
    for name, workload in workloads.items():
        timed, floor = Timed(workload), floor_ms(engine, workload, bandwidth)
        for side, rounds in (("ours", 3 if task.scale == "full" else 1), ("hf", 1)):
            with costs_only(result, f"{name}, {side}"):
                timed.take([side], model, engine, rounds=rounds)
            result.figures[name] = {"floor_ms_per_step": floor, **timed.figures}
            result.ratios |= timed.ratios(name)
            yield result
        rows += [timed.row(name, floor)] if len(timed.whole) == 2 else []
    if WITHOUT_GRAPHS in workloads and device == "cuda":
        with costs_only(result, "without graphs"):
            seconds = without_graphs(model, workloads[WITHOUT_GRAPHS])
            result.figures[WITHOUT_GRAPHS]["seconds_without_graphs"] = seconds
        yield result
    print_table("Rollouts", COLUMNS, rows)


def workloads_of(task: Task) -> dict[str, Workload]:
    """Groups of 8; 700-token prompts and 324 new tokens on a GPU."""
    if task.scale == "full":
        return rollouts_of("cuda", task.rows)
    small = replace(SMALL, patches=8)
    if task.scale == "smoke":
        return {"B=8": small.of(6)}
    return {"B=8": small.of(24), "B=32": replace(small.of(24), prompts=4)}
