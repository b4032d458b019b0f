"""Compiles every kernel at every shipped launch, without a GPU, and reads the machine code. `python bench/aot.py`.

Per kernel and launch: registers, shared memory, stack, spills (local-memory stores and loads in the SASS) and tensor
core instructions (in the PTX), for sm_80, sm_90 and sm_100. Exit code 1 when a launch does not compile or could not
start for want of shared memory, when a kernel spills, or when one has a dot and, on sm_90, no tensor core instruction
(dots of float32 in IEEE precision are exempt: no tensor core computes those). Other tritons generate other code:

    pip install --no-deps --target /tmp/triton36 triton==3.6.0 && python bench/aot.py --triton /tmp/triton36
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastgrpo_kernels.tl_utils import CompiledLaunch, compile_only
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
    )
)
"""Each defines `aot_cases()`: labels, and calls of its launchers on meta tensors at the shipped shapes and configs."""
ARCHES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a block may have."""
JOBS = 2

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORE = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCMMA"}
"""PTX instructions that run on tensor cores, and what the machine calls them."""
SPILL = re.compile(r"\b(?:STL|LDL)\b")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
DOT = re.compile(r"tt\.dot(?:_scaled)?\b.*")


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, compiled for one architecture; or a case that did not compile."""

    arch: int
    kernel: str
    case: str
    digest: str
    """Of source, arguments, options and target: equal launches are compiled, and counted, once."""
    meta: str = ""
    registers: int = 0
    shared: int = 0
    """Bytes a block takes."""
    stack: int = 0
    """Bytes a thread takes."""
    spills: int = 0
    """Local-memory instructions in the machine code."""
    has_dot: bool = False
    ieee: bool = False
    """Whether every dot is float32 in IEEE precision."""
    tensor_cores: str = ""
    """Tensor core instructions and their number."""
    error: str = ""

    @property
    def lacks_tensor_core(self) -> bool:
        return self.has_dot and not self.ieee and not self.tensor_cores

    @property
    def faults(self) -> list[str]:
        named = {
            self.error: bool(self.error),
            f"{self.spills} spills": self.spills > 0,
            "a dot without tensor cores": self.lacks_tensor_core,
        }
        return [name for name, found in named.items() if found]


def main() -> int:
    arguments = _parser().parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("aot.py compiles kernels, TRITON_INTERPRET=1 interprets them: unset it.", file=sys.stderr)
        return 2
    if arguments.triton:
        return _under_other_triton(arguments.triton)
    modules, arches = arguments.module or MODULES, arguments.arch or ARCHES
    launches = list(compile_all(modules, arches, arguments.kernel, arguments.quick))
    _print_launches(launches)
    return _result(launches).finish(arguments.out)


def compile_all(modules: Iterable[str], arches: Iterable[int], kernel: str | None, quick: bool) -> Iterator[Launch]:
    """Every distinct launch of the modules' cases, the architectures in order."""
    cases = [(module, index) for module in modules for index in _case_numbers(module, quick)]
    jobs = [(module, index, arch) for arch in arches for module, index in cases]
    seen = set()
    with ProcessPoolExecutor(JOBS) as pool:
        for launch in (launch for launches in pool.map(compile_case, jobs) for launch in launches):
            if launch.digest not in seen and (kernel is None or kernel in launch.kernel or launch.error):
                seen.add(launch.digest)
                yield launch


def compile_case(job: tuple[str, int, int]) -> list[Launch]:
    """What case `job[1]` of module `job[0]` launches, compiled for sm_`job[2]`."""
    module, index, arch = job
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    label, call = _cases(module)[index]
    error = ""
    # Where ptxas fails, triton prints the whole program.
    with compile_only(arch) as compiled, contextlib.redirect_stdout(io.StringIO()):
        try:
            call()
        except Exception as exception:  # whatever a compiler may raise is this case's finding
            error = f"{type(exception).__name__}: {' '.join(str(exception).split())}"
            # Triton may quote the kernel's source first and say what is wrong with it last.
            error = error if len(error) < 400 else f"{error[:120]} … {error[-280:]}"
    launches = [read_binary(launch, arch, label) for launch in compiled]
    if error:
        launches.append(Launch(arch, module.rsplit(".", 1)[-1], label, f"{arch} {module} {label}", error=error))
    return launches


def read_binary(launch: CompiledLaunch, arch: int, case: str) -> Launch:
    """Reads a compiled launch's resources and instructions."""
    kernel = launch.kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = USAGE.search(_dump("-res-usage", file.name))
        assert usage is not None, f"cuobjdump says nothing of {launch.name}"
        # What spills goes to the stack: without one there is nothing to disassemble for, which takes a second.
        code = _dump("-sass", file.name) if int(usage[2]) else ""
    dots = DOT.findall(kernel.asm["ttir"])
    shared, limit = kernel.metadata.shared, SHARED_LIMIT[arch]
    ptx = kernel.asm["ptx"]
    instructions = {name: len(re.findall(rf"\b{re.escape(op)}\b", ptx)) for op, name in TENSOR_CORE.items()}
    return Launch(
        arch=arch,
        kernel=launch.name,
        case=case,
        digest=kernel.hash,
        meta=_describe(launch.meta),
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=shared,
        spills=len(SPILL.findall(code)),
        has_dot=bool(dots),
        ieee=all("inputPrecision" not in dot and "xf32> * " in dot for dot in dots),
        tensor_cores=", ".join(f"{count} {name}" for name, count in instructions.items() if count),
        error=f"{shared} bytes of shared memory, {limit} at most" if shared > limit else "",
    )


def _dump(what: str, cubin: str) -> str:
    return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout


def _describe(meta: dict[str, Any]) -> str:
    """`128×256×64 8w 3s` of tile sizes in their order, num_warps and num_stages; then the flags that are on."""
    tiles = "×".join(str(v) for k, v in meta.items() if k.startswith("BLOCK"))
    flags = {k: v for k, v in meta.items() if k.isupper() and not k.startswith("BLOCK") and v}
    others = [k if v is True else f"{k}={getattr(v, '__name__', v)}" for k, v in flags.items()]
    counts = [f"{meta[k]}{k[4]}" for k in ("num_warps", "num_stages") if k in meta]
    return " ".join(filter(None, [tiles, *counts, *others]))


def _cases(module: str) -> list[tuple[str, Callable[[], None]]]:
    return list(importlib.import_module(module).aot_cases())


def _case_numbers(module: str, quick: bool) -> range:
    count = len(_cases(module))
    return range(0, count, max(1, count - 1)) if quick else range(count)


def _print_launches(launches: Iterable[Launch]) -> None:
    columns = ["kernel", "case", "config", "regs", "shared", "stack", "spills", "tensor cores"]
    for arch, rows in _by_arch(launches):
        print_table(
            f"sm_{arch}, triton {triton.__version__}",
            columns,
            [
                [r.kernel, r.case, r.meta, r.registers, r.shared, r.stack, r.spills, r.tensor_cores or "–"]
                for r in rows
                if r.registers
            ],
        )
        by_fault: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            for fault in row.faults:
                by_fault.setdefault((row.kernel, fault), []).append(row.case)
        for (kernel, fault), cases in by_fault.items():
            print(f"sm_{arch} {kernel}: {fault} ({', '.join(cases)})")


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
    arguments.add_argument("--module", action="append", metavar="NAME", help="instead of the shipped ones; repeatable")
    arguments.add_argument("--quick", action="store_true", help="the first and the last case of each module")
    arguments.add_argument("--triton", metavar="DIR", help="use the triton installed in DIR")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
