"""Compiles the launches of modules' `aot_cases()` without a GPU, and reads what the machine code takes."""

import contextlib
import importlib
import io
import math
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastgrpo_kernels.tl_utils import CompiledLaunch, compile_only
from gpus import GPUS, Filling, filling, floor_seconds

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
    filling: Filling = Filling(0.0, 0.0, 0.0)
    """Of a GPU of this architecture."""
    floor_us: float = 0.0
    """The least that the work takes on an H100, microseconds."""
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


def compile_all(
    modules: Iterable[str], arches: Iterable[int], kernel: str | None, case: str | None, quick: bool
) -> Iterator[Launch]:
    """Every distinct launch of the modules' cases, the architectures in order."""
    cases = [
        (module, index)
        for module in modules
        for index in _case_numbers(module, quick)
        if case is None or case in _cases(module)[index][0]
    ]
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
    with compile_only(arch, GPUS[arch].multiprocessors) as compiled, contextlib.redirect_stdout(io.StringIO()):
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
    gpu, shared, registers = GPUS[arch], kernel.metadata.shared, int(usage[1])
    ptx = kernel.asm["ptx"]
    instructions = {name: len(re.findall(rf"\b{re.escape(op)}\b", ptx)) for op, name in TENSOR_CORE.items()}
    return Launch(
        arch=arch,
        kernel=launch.name,
        case=case,
        digest=kernel.hash,
        meta=_describe(launch.meta),
        registers=registers,
        stack=int(usage[2]),
        shared=shared,
        spills=len(SPILL.findall(code)),
        has_dot=bool(dots),
        ieee=all("inputPrecision" not in dot and "xf32> * " in dot for dot in dots),
        tensor_cores=", ".join(f"{count} {name}" for name, count in instructions.items() if count),
        filling=filling(gpu, math.prod(launch.grid), kernel.metadata.num_warps, registers, shared),
        floor_us=1e6 * floor_seconds(launch.flops, launch.moved),
        error=f"{shared} bytes of shared memory, {gpu.block_shared} at most" if shared > gpu.block_shared else "",
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
