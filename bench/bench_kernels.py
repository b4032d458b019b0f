"""Times the kernels beside plain torch and the peers, each only after its results were found right.

    python bench/bench_kernels.py --device cpu
    python bench/bench_kernels.py --device cuda --out bench/results/kernels-h200.json

Time is of forward and backward, and of the head's forward alone; peak memory is above the inputs, results included: on
CPU of the second call in a fresh process, on CUDA of the allocator. The floor is a large matrix product, or a large
copy, on the same machine in the same run. A side whose results are wrong is not timed; where it is one of ours, the
run fails.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, compute_dtype, parser, print_table
from sides import OURS, Op, Side
from sides.ops import VOCABULARY, ops_of
from timing import copies_for, in_fresh_process, kernel_seconds, paired_ratio, paired_seconds, peak_bytes, spread

UNITS = {"gemm": ("TFLOP/s", 1e12), "copy": ("GB/s", 1e9)}
REACH_SHAPE, REACH_MEMORY_VS_TORCH = f"T=2048 H=256 V={VOCABULARY} float32", 8.0
COLUMNS = ("side", "ms", "spread", "", "of floor", "forward ms", "peak MB", "worst error")


@dataclass(frozen=True)
class Effort:
    """How the ops are measured."""

    device: str
    scale: str
    rounds: int
    peaks: bool = True
    """Whether memory is measured too."""


@dataclass
class Measured:
    """One side of one op at one shape."""

    side: str
    errors: dict[str, float] = field(default_factory=dict)
    fault: str = ""
    """Why it was not timed."""
    seconds: list[float] = field(default_factory=list)
    forward_seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    """Bytes."""
    not_captured: str = ""
    """Why its time is of calls one by one, Python's part included, where the others' is of a CUDA graph."""

    def record(self, op: Op, floor: float) -> dict[str, Any]:
        """For JSON. `floor`: FLOPs or bytes per second."""
        if self.fault:
            return {"fault": self.fault, "errors": self.errors}
        seconds = statistics.median(self.seconds)
        found = {
            "ms": 1e3 * seconds,
            "spread": spread(self.seconds),
            "rate": op.work.amount / seconds,
            "of_floor": op.work.amount / floor / seconds,
            "peak_bytes": self.peak,
            "errors": self.errors,
        }
        if self.not_captured:
            found["not_captured"] = self.not_captured
        return found | ({"forward_ms": 1e3 * statistics.median(self.forward_seconds)} if self.forward_seconds else {})


def main() -> int:
    arguments = _parser().parse_args()
    device, effort = arguments.device, Effort(arguments.device, arguments.scale, arguments.rounds)
    ops = [op for op in ops_of(device, arguments.scale) if arguments.op in (None, op.name)]
    if arguments.memory_of:
        print(_peak_here(ops[0], arguments.memory_of, device))
        return 0
    result, floors = Result("bench_kernels", device), measure_floors(device)
    result.figures = {"floors": floors}
    kept = (*arguments.side, *OURS, "torch") if arguments.side else ()
    for name in dict.fromkeys(op.name for op in ops):
        shapes = [op for op in ops if op.name == name][: arguments.shapes]
        bench_shapes(result, shapes, floors, effort, lambda side: not kept or side.name in kept)
    _compare_with_reach(result)
    return result.finish(arguments.out)


def measure_floors(device: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, in the head's dtype, and bytes/s, read and written, of a large copy."""
    ceilings = measure_ceilings(device, compute_dtype(device))
    print(f"Floors: {ceilings.text}")
    return {"gemm": ceilings.flops_per_s, "copy": ceilings.bytes_per_s}


def bench_shapes(
    result: Result,
    ops: Sequence[Op],
    floors: dict[str, float],
    effort: Effort,
    wanted: Callable[[Side], bool] = lambda side: True,
) -> None:
    """All shapes of one op: checks, times and peaks of the sides that are `wanted`; the first shape's ratios."""
    torch_errors: dict[str, float] = {}
    for op in ops:
        # Past some recompilations torch.compile falls back to eager: every shape starts afresh.
        torch.compiler.reset()
        inputs, sides = op.make_inputs(), [side for side in op.sides() if wanted(side)]
        rows, torch_errors = check_sides(op, sides, inputs, torch_errors)
        right = {side.name: side for side in sides if not rows[side.name].fault}
        _time_rows(op, right, rows, inputs, effort)
        forward = {name: functools.partial(side.forward, inputs) for name, side in right.items() if side.forward}
        for name, times in paired_seconds(forward, rounds=effort.rounds, device=effort.device).items():
            rows[name].forward_seconds = times
        for name, side in right.items() if effort.peaks else ():
            rows[name].peak = _peak(op, side, inputs, effort)
        del inputs
        torch.cuda.empty_cache()
        floor = floors[op.work.floor]
        _print_rows(op, list(rows.values()), floor)
        result.figures.setdefault(op.name, {})[op.shape] = {name: row.record(op, floor) for name, row in rows.items()}
        ours = [name for name in OURS if name in rows]
        result.checks |= {f"{op.name} {op.shape}: {name} is right": not rows[name].fault for name in ours}
        if op is ops[0]:
            result.ratios |= ratios_of(op, rows)


def check_sides(
    op: Op, sides: Sequence[Side], inputs: Any, torch_errors: dict[str, float]
) -> tuple[dict[str, Measured], dict[str, float]]:
    """Each side's errors against float64, and its fault; and plain torch's errors.

    Where plain torch cannot run (its logits fill the memory), those of the shape before, `torch_errors`, are its
    measure.
    """
    exact = op.exact(inputs)
    rows = {}
    for side in sorted(sides, key=lambda side: side.name != "torch"):
        row = rows[side.name] = Measured(side.name)
        try:
            row.errors = op.errors(side.run(inputs), exact)
        except Exception as failure:  # whatever a peer raises costs it its timing, not us the run
            row.fault = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
        if side.name == "torch" and not row.fault:
            torch_errors = row.errors
        row.fault = row.fault or op.fault(side.name, row.errors, torch_errors)
        if row.fault:
            print(f"Not timed: {op.name} {op.shape} of {side.name}: {row.fault}")
    return {side.name: rows[side.name] for side in sides}, torch_errors


def ratios_of(op: Op, rows: dict[str, Measured]) -> dict[str, float]:
    """Theirs over ours in time and memory; those of other ops than the head, and of its recompute mode, say so."""
    found = {}
    for ours in (rows[name] for name in OURS if name in rows and not rows[name].fault):
        prefix = ("" if op.name == "head" else f"{op.name}_") + ("" if ours.side == OURS[0] else "recompute_")
        for row in (row for row in rows.values() if row.side not in OURS and not row.fault):
            found[f"{prefix}time_vs_{row.side}"] = paired_ratio(row.seconds, ours.seconds)
            if row.peak and ours.peak:
                found[f"{prefix}memory_vs_{row.side}"] = row.peak / ours.peak
    return found


def _time_rows(op: Op, sides: dict[str, Side], rows: dict[str, Measured], inputs: Any, effort: Effort) -> None:
    """Both passes. Small ops on a GPU are captured, on inputs that take turns; else a launch is all one sees."""
    called = sides
    if effort.device == "cuda" and op.is_small:
        copies = [inputs, *(op.make_inputs() for _ in range(copies_for(op.work.amount) - 1))]
        captured, faults = kernel_seconds(
            {name: side.run for name, side in sides.items()}, copies, rounds=effort.rounds
        )
        for name, times in captured.items():
            rows[name].seconds = times
        for name, fault in faults.items():
            rows[name].not_captured = fault
        called = {name: sides[name] for name in faults}
    calls = {name: functools.partial(side.run, inputs) for name, side in called.items()}
    for name, times in paired_seconds(calls, rounds=effort.rounds, device=effort.device).items():
        rows[name].seconds = times


def _peak(op: Op, side: Side, inputs: Any, effort: Effort) -> int | None:
    """Bytes; the dry run looks at ours and plain torch alone."""
    if effort.device == "cuda":
        return peak_bytes(functools.partial(side.run, inputs), "cuda")
    if effort.scale == "tiny" and side.name not in (OURS[0], "torch"):
        return None
    flags = ("--device", "cpu", "--scale", effort.scale, "--op", op.name, "--memory-of", side.name)
    return int(in_fresh_process(*flags))


def _peak_here(op: Op, name: str, device: str) -> int:
    """Of the second call: the first one loads and compiles what stays."""
    side = next(side for side in op.sides() if side.name == name)
    inputs = op.make_inputs()
    side.run(inputs)
    return peak_bytes(lambda: side.run(inputs), device)


def _print_rows(op: Op, rows: list[Measured], floor: float) -> None:
    unit, scale = UNITS[op.work.floor]
    cells = []
    for row in (row for row in rows if not row.fault):
        found = row.record(op, floor)
        peak = "–" if row.peak is None else f"{row.peak / 1e6:,.0f}"
        shares = f"{found['spread']:.0%}", found["rate"] / scale, f"{found['of_floor']:.0%}"
        worst = f"{max(row.errors.values()):.1e}"
        cells.append([row.side, found["ms"], *shares, found.get("forward_ms", "–"), peak, worst])
    print_table(f"{op.name}, {op.shape}", [unit if name == "" else name for name in COLUMNS], cells)


def _compare_with_reach(result: Result) -> None:
    """Memory is repeatable: at the committed shape its bound is a check."""
    if REACH_SHAPE in result.figures.get("head", {}):
        ratio = result.ratios.get("memory_vs_torch", 0.0)
        result.checks["head needs at most 1/8 of plain torch's memory"] = ratio >= REACH_MEMORY_VS_TORCH


def _parser() -> argparse.ArgumentParser:
    arguments = parser("Times the kernels beside plain torch and the peers, each only where its results are right.")
    arguments.add_argument("--op", choices=list(dict.fromkeys(op.name for op in ops_of("cpu", "tiny"))))
    arguments.add_argument("--side", action="append", metavar="NAME", help="beside ours and torch; all if left out")
    arguments.add_argument("--shapes", type=int, metavar="N", help="only the first N of each op")
    arguments.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: a dry run, in seconds")
    arguments.add_argument("--rounds", type=int, default=5, help="timings of each side, taking turns")
    arguments.add_argument("--memory-of", metavar="SIDE", help=argparse.SUPPRESS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
