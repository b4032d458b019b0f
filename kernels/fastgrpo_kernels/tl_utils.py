"""Launches kernels, or compiles them ahead of time, without a GPU, exactly as they would be launched."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor


@dataclass(frozen=True)
class CompiledLaunch:
    """A launch that `compile_only` turned into machine code."""

    name: str
    """The kernel's function name."""
    meta: dict[str, Any]
    """Its compile-time arguments: tile sizes, flags, num_warps, num_stages."""
    kernel: Any
    """triton's `CompiledKernel`: `.asm["cubin"]`, `.asm["ptx"]`, `.metadata.shared`."""


_compiled: list[CompiledLaunch] | None = None
"""Where `launch` puts its work while `compile_only` is open."""


_target: int | None = None
"""The architecture that `compile_only` compiles for."""


def target_arch() -> int:
    """80, 90, 100, …: the architecture that a launch is for. 90 where there is no GPU (Triton's interpreter)."""
    if _target is not None:
        return _target
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU, the size of a persistent grid; a few without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`; inside `compile_only`, the same specialisation is compiled and nothing runs."""
    if _compiled is None:
        with _device_of(args):
            kernel[grid](*args, **meta)
        return
    # Tensors of torch's allocator are aligned to 16 bytes, as MockTensor says it is.
    mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in args]
    _compiled.append(CompiledLaunch(kernel.__name__, meta, kernel.warmup(*mocked, grid=(1,), **meta)))


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Makes the tensors' device current, since Triton launches on the current device."""
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    return nullcontext() if device is None or device.type != "cuda" else torch.cuda.device(device)


@contextmanager
def compile_only(capability: int) -> Iterator[list[CompiledLaunch]]:
    """Compiles every kernel launched in the block for sm_`capability` (80, 90, 100), without a GPU.

    Call launchers, not ops, with tensors on the meta device: shapes, dtypes and strides then specialise the kernels as
    real inputs would. Not for a process that also runs kernels.
    """
    global _compiled, _target
    assert _compiled is None, "compile_only does not nest"
    active = driver._active
    driver.set_active(_TargetOnly(GPUTarget("cuda", capability, 32)))
    _compiled, _target = [], capability
    try:
        yield _compiled
    finally:
        _compiled = _target = None
        driver._active = active


class _TargetOnly:
    """The parts of a driver that triton's compiler needs, without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device: one cache per architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")
