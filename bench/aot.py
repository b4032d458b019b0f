"""Compiles every kernel at every shipped launch, without a GPU, and reads the machine code. `python bench/aot.py`.

Per kernel and launch: registers, shared memory, stack, spills (local-memory stores and loads in the SASS), tensor core
instructions (in the PTX); how it fills a GPU of the architecture (share of the warps that a multiprocessor can have,
waves of blocks, share of time in which the last wave leaves multiprocessors empty); and, for sm_90, the least time its
work takes on an H100, at 798 TFLOP/s in bfloat16 and 3.0 TB/s. For sm_80, 89, 90, 100 and 120.

Exit code 1 when a launch does not compile or could not start for want of shared memory, when a kernel spills, or when
one has a dot and, on sm_90, no tensor core instruction (dots of float32 in IEEE precision are exempt: no tensor core
computes those). Other tritons generate other code:

    pip install --no-deps --target /tmp/triton36 triton==3.6.0 && python bench/aot.py --triton /tmp/triton36
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton
from aot_compile import Launch, compile_all
from gpus import GPUS
from harness import Result, parser, print_table

MODULES = tuple(
    f"fastgrpo_kernels.{name}"
    for name in (
        "linear_logprob_passes",
        "grpo_loss",
        "kv_cache",
        "attention_launch",
        "sampling",
        "norms",
        "activations",
        "rotary",
        "merge_attention",
        "add_norm",
        "thin_linear_kernels",
    )
)
"""Each defines `aot_cases()`: labels, and calls of its launchers on meta tensors at the shipped shapes and configs."""
ARCHES = tuple(GPUS)


def main() -> int:
    arguments = _parser().parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("aot.py compiles kernels, TRITON_INTERPRET=1 interprets them: unset it.", file=sys.stderr)
        return 2
    if arguments.triton:
        return _under_other_triton(arguments.triton)
    modules, arches = arguments.module or MODULES, arguments.arch or ARCHES
    launches = list(compile_all(modules, arches, arguments.kernel, arguments.only, arguments.quick))
    _print_launches(launches)
    return _result(launches).finish(arguments.out)


def _print_launches(launches: Iterable[Launch]) -> None:
    columns = ["kernel", "case", "config", "regs", "shared", "stack", "spills", "tensor cores"]
    columns += ["occupancy", "waves", "tail"]
    for arch, rows in _by_arch(launches):
        floors = ["floor, us"] if arch == 90 else []
        print_table(
            f"sm_{arch} ({GPUS[arch].name}), triton {triton.__version__}",
            columns + floors,
            [_cells(row) + ([f"{row.floor_us:.2f}"] if floors else []) for row in rows if row.registers],
        )
        by_fault: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            for fault in row.faults:
                by_fault.setdefault((row.kernel, fault), []).append(row.case)
        for (kernel, fault), cases in by_fault.items():
            print(f"sm_{arch} {kernel}: {fault} ({', '.join(cases)})")


def _cells(row: Launch) -> list[str | int]:
    used = row.filling
    found: list[str | int] = [row.kernel, row.case, row.meta, row.registers, row.shared, row.stack, row.spills]
    return [*found, row.tensor_cores or "–", f"{used.occupancy:.0%}", f"{used.waves:.2f}", f"{used.tail:.0%}"]


def _by_arch(launches: Iterable[Launch]) -> Iterator[tuple[int, list[Launch]]]:
    by_arch: dict[int, list[Launch]] = {}
    for launch in launches:
        by_arch.setdefault(launch.arch, []).append(launch)
    yield from by_arch.items()


def _result(launches: list[Launch]) -> Result:
    """The record; every fault named under its check."""
    found = {
        "failed": [launch for launch in launches if launch.error],
        **{f"spilling_sm{arch}": [r for r in launches if r.arch == arch and r.spills] for arch in ARCHES},
        "no_tensor_core_sm90": [launch for launch in launches if launch.arch == 90 and launch.lacks_tensor_core],
    }
    result = Result("aot", "cpu")
    result.checks = {f"{name}_is_0": not faulty for name, faulty in found.items()}
    result.checks["something_compiled"] = any(launch.registers for launch in launches)
    result.figures = {
        "kernels": len({launch.kernel for launch in launches if launch.registers}),
        "configs": sum(launch.registers > 0 for launch in launches),
        **{name: len(faulty) for name, faulty in found.items()},
        "faulty": {
            name: [f"sm_{launch.arch} {launch.kernel} ({launch.case})" for launch in faulty]
            for name, faulty in found.items()
            if faulty
        },
        "triton": triton.__version__,
    }
    return result


def _under_other_triton(directory: str) -> int:
    """This command again, with the triton in `directory`."""
    if not (Path(directory) / "triton" / "__init__.py").exists():
        print(f"--triton {directory}: no triton there; pip install --no-deps --target it.", file=sys.stderr)
        return 2
    at = next(i for i, argument in enumerate(sys.argv) if argument.startswith("--triton"))
    rest = sys.argv[1:at] + sys.argv[at + (1 if "=" in sys.argv[at] else 2) :]
    path = os.pathsep.join(filter(None, [directory, os.environ.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, __file__, *rest], env={**os.environ, "PYTHONPATH": path}).returncode


def _parser() -> argparse.ArgumentParser:
    arguments = parser("Compiles every kernel at every shipped launch and reads the machine code; --device is unused.")
    arguments.add_argument("--arch", type=int, action="append", choices=ARCHES, help="sm_ARCH alone; may be repeated")
    arguments.add_argument("--kernel", metavar="NAME", help="kernels whose name contains this")
    arguments.add_argument("--only", metavar="CASE", help="cases whose label contains this")
    arguments.add_argument("--module", action="append", metavar="NAME", help="instead of the shipped ones; repeatable")
    arguments.add_argument("--quick", action="store_true", help="the first and the last case of each module")
    arguments.add_argument("--triton", metavar="DIR", help="use the triton installed in DIR")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
