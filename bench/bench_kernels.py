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
import json
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from device_time import copies_for, kernel_seconds
from harness import Result, in_fresh_process, paired_ratio, paired_seconds, parser, peak_bytes, print_table, spread
from kernel_ops import OURS, VOCABULARY, Op, Side, head_shape, ops_of, sides_of

UNITS = {"gemm": ("TFLOP/s", 1e12), "copy": ("GB/s", 1e9)}
REACH_MEMORY_VS_TORCH = 8.0


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
    device, rounds = arguments.device, arguments.rounds
    ops = [op for op in ops_of(device, arguments.scale) if arguments.op in (None, op.name)]
    if arguments.memory_of:
        print(json.dumps({"peak": _peak_here(ops[0], arguments.memory_of, device)}))
        return 0
    result = Result("bench_kernels", device)
    floors = measure_floors(device, arguments.scale, rounds)
    result.figures = {"floors": floors, "left_out": {}}
    for name in dict.fromkeys(op.name for op in ops):
        sides, left_out = sides_of(name, device)
        for peer, reason in left_out.items():
            print(f"Left out: {peer} ({reason})")
        result.figures["left_out"] |= left_out
        sides = [side for side in sides if not arguments.side or side.name in (*arguments.side, *OURS, "torch")]
        shapes = [op for op in ops if op.name == name][: arguments.shapes]
        bench_shapes(result, shapes, sides, floors, arguments)
    _compare_with_reach(result)
    return result.finish(arguments.out)


def measure_floors(device: str, scale: str, rounds: int) -> dict[str, float]:
    """FLOP/s of a large matrix product, in the head's dtype, and bytes/s, read and written, of a large copy."""
    size, count = {"tiny": (256, 1 << 18), "full": (8192, 1 << 28) if device == "cuda" else (2048, 1 << 26)}[scale]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    sides = {"gemm": lambda: left @ right, "copy": lambda: target.copy_(source)}
    times = {
        name: statistics.median(t) for name, t in paired_seconds(sides, rounds=rounds, warmup=2, device=device).items()
    }
    floors = {"gemm": 2.0 * size**3 / times["gemm"], "copy": 2.0 * 4 * count / times["copy"]}
    print(f"Floors: {floors['gemm'] / 1e12:.3g} TFLOP/s ({dtype}), {floors['copy'] / 1e9:.4g} GB/s")
    return floors


def bench_shapes(
    result: Result, ops: list[Op], sides: list[Side], floors: dict[str, float], arguments: argparse.Namespace
) -> None:
    """All shapes of one op: checks, times, peaks; the first shape's ratios.

    Of `arguments`, device, scale and rounds count, and `peaks`: whether memory is measured too.
    """
    torch_errors: dict[str, float] = {}
    for op in ops:
        # Past some recompilations torch.compile falls back to eager: every shape starts afresh.
        torch.compiler.reset()
        inputs = op.make_inputs()
        rows, torch_errors = check_sides(op, sides, inputs, torch_errors)
        right = {side.name: side for side in sides if not rows[side.name].fault}
        _time_rows(op, right, rows, inputs, arguments)
        forward_only = {name: side for name, side in right.items() if side.forward_only}
        for name, times in _times(forward_only, inputs, "forward", arguments).items():
            rows[name].forward_seconds = times
        for name, side in right.items():
            rows[name].peak = _peak(op, side, inputs, arguments) if arguments.peaks else None
        del inputs
        torch.cuda.empty_cache()
        floor = floors[op.work.floor]
        _print_rows(op, list(rows.values()), floor)
        result.figures.setdefault(op.name, {})[op.shape] = {name: row.record(op, floor) for name, row in rows.items()}
        for name in OURS:
            if name in rows:
                result.checks[f"{op.name} {op.shape}: {name} is right"] = not rows[name].fault
        if op is ops[0]:
            result.ratios |= ratios_of(op, rows)


def check_sides(
    op: Op, sides: list[Side], inputs: Any, torch_errors: dict[str, float]
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
            row.errors = op.errors(side.forward_backward(inputs), exact)
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


def _time_rows(
    op: Op, sides: dict[str, Side], rows: dict[str, Measured], inputs: Any, arguments: argparse.Namespace
) -> None:
    """Both passes. Small ops on a GPU are captured, on inputs that take turns; else a launch is all one sees."""
    called = sides
    if arguments.device == "cuda" and op.is_small:
        copies = [inputs, *(op.make_inputs() for _ in range(copies_for(op.work.amount) - 1))]
        calls = {name: side.forward_backward for name, side in sides.items()}
        captured, faults = kernel_seconds(calls, copies, rounds=arguments.rounds)
        for name, times in captured.items():
            rows[name].seconds = times
        for name, fault in faults.items():
            rows[name].not_captured = fault
        called = {name: sides[name] for name in faults}
    for name, times in _times(called, inputs, "forward_backward", arguments).items():
        rows[name].seconds = times


def _times(sides: dict[str, Side], inputs: Any, what: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    calls = {name: functools.partial(getattr(side, what), inputs) for name, side in sides.items()}
    return paired_seconds(calls, rounds=arguments.rounds, device=arguments.device)


def _peak(op: Op, side: Side, inputs: Any, arguments: argparse.Namespace) -> int | None:
    """Bytes; the dry run looks at ours and plain torch alone."""
    if arguments.device == "cuda":
        return peak_bytes(functools.partial(side.forward_backward, inputs), "cuda")
    if arguments.scale == "tiny" and side.name not in (OURS[0], "torch"):
        return None
    flags = ("--device", "cpu", "--scale", arguments.scale, "--op", op.name, "--memory-of", side.name)
    return int(in_fresh_process(*flags)["peak"])


def _peak_here(op: Op, name: str, device: str) -> int:
    """Of the second call: the first one loads and compiles what stays."""
    side = next(side for side in sides_of(op.name, device)[0] if side.name == name)
    inputs = op.make_inputs()
    side.forward_backward(inputs)
    return peak_bytes(lambda: side.forward_backward(inputs), device)


def _print_rows(op: Op, rows: list[Measured], floor: float) -> None:
    unit, scale = UNITS[op.work.floor]
    cells = []
    for row in rows:
        if row.fault:
            continue
        found = row.record(op, floor)
        cells.append(
            [
                row.side,
                found["ms"],
                f"{found['spread']:.0%}",
                found["rate"] / scale,
                f"{found['of_floor']:.0%}",
                found.get("forward_ms", "–"),
                "–" if row.peak is None else f"{row.peak / 1e6:,.0f}",
                f"{max(row.errors.values()):.1e}",
            ]
        )
    columns = ["side", "ms", "spread", unit, "of floor", "forward ms", "peak MB", "worst error"]
    passes = ": forward + backward" if op.name in ("head", "loss") else ""
    print_table(f"{op.name}, {op.shape}{passes}", columns, cells)


def _compare_with_reach(result: Result) -> None:
    """The numbers to reach, beside what was measured. Memory is repeatable, so its bound is a check; time is not."""
    rows: list[list[Any]] = []
    head = result.figures.get("head", {})
    at_16k = head.get(head_shape(16_384, 1536, VOCABULARY, torch.bfloat16), {}).get("fastgrpo", {})
    at_32k = head.get(head_shape(32_768, 1536, VOCABULARY, torch.bfloat16), {})
    if "ms" in at_16k:
        rows.append(["head, 16k tokens, H=1536, forward + backward", "≤ 36 ms", f"{at_16k['ms']:.1f} ms"])
        rows.append(["the same, of the measured floor", "≥ 81 %", f"{at_16k['of_floor']:.0%}"])
    for name, reach in (("fastgrpo", 2 * 32_768 * VOCABULARY), ("fastgrpo_recompute", 1 << 30)):
        if "peak_bytes" in at_32k.get(name, {}):
            rows.append(
                [f"peak at 32k tokens, {name}", f"≤ {reach / 1e9:.2f} GB", f"{at_32k[name]['peak_bytes'] / 1e9:.2f} GB"]
            )
    if head_shape(2048, 256, VOCABULARY, torch.float32) in head:
        ratio = result.ratios.get("memory_vs_torch", 0.0)
        rows.append(["head on CPU: plain torch's peak over ours", f"≥ {REACH_MEMORY_VS_TORCH:g}", ratio])
        rows.append(["head on CPU: plain torch's time over ours", "≥ 0.91", result.ratios.get("time_vs_torch", 0.0)])
        result.checks["head needs at most 1/8 of plain torch's memory"] = ratio >= REACH_MEMORY_VS_TORCH
    if rows:
        print_table("Numbers to reach", ["what", "reach", "measured"], rows)


def _parser() -> argparse.ArgumentParser:
    arguments = parser("Times the kernels beside plain torch and the peers, after checking their results.")
    arguments.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: a dry run")
    arguments.add_argument("--op", choices=("head", "loss", "attention", "rope", "sample"), help="this one alone")
    arguments.add_argument("--side", action="append", metavar="NAME", help="this peer alone, beside ours and torch")
    arguments.add_argument("--shapes", type=int, metavar="N", help="the first N shapes of each op")
    arguments.add_argument("--rounds", type=int, default=5, help="timings of each side, taking turns")
    arguments.set_defaults(peaks=True)
    arguments.add_argument("--memory-of", metavar="SIDE", help=argparse.SUPPRESS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
