"""Launches kernels, or compiles them ahead of time, without a GPU, exactly as they would be launched."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class CompiledLaunch:
    """A launch that `compile_only` turned into machine code."""

    name: str
    """The kernel's function name."""
    meta: dict[str, Any]
    """Its compile-time arguments: tile sizes, flags, num_warps, num_stages."""
    kernel: Any
    """triton's `CompiledKernel`: `.asm["cubin"]`, `.asm["ptx"]`, `.metadata.shared`."""
    grid: tuple[int, ...]
    flops: float
    """Of its matrix products."""
    moved: float
    """Bytes that it must read and write."""


_compiled: list[CompiledLaunch] | None = None
"""Where `launch` puts its work while `compile_only` is open."""


class Target(NamedTuple):
    """What `compile_only` compiles for."""

    arch: int
    multiprocessors: int


_target: Target | None = None


def target_arch() -> int:
    """80, 90, 100, …: the architecture that a launch is for. 90 where there is no GPU (Triton's interpreter)."""
    if _target is not None:
        return _target.arch
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU, the size of a persistent grid; a few without a GPU."""
    if _target is not None:
        return _target.multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, flops: float = 0.0, moved: float | None = None, **meta: Any
) -> None:
    """`kernel[grid](*args, **meta)`; inside `compile_only`, the same specialisation is compiled and nothing runs.

    Args:
        flops: of its matrix products, for `CompiledLaunch`.
        moved: bytes that it must read and write, for the same; None: each tensor of `args` once.
    """
    if _compiled is None:
        with _device_of(args):
            kernel[grid](*args, **meta)
        return
    # Tensors of torch's allocator are aligned to 16 bytes, as MockTensor says it is.
    mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in args]
    compiled = kernel.warmup(*mocked, grid=(1,), **meta)
    moved = bytes_of(*args) if moved is None else moved
    _compiled.append(CompiledLaunch(kernel.__name__, meta, compiled, grid, flops, moved))


def bytes_of(*args: Any) -> int:
    """Of all tensors among them, those behind descriptors too; one that is passed twice counts once."""
    tensors = (arg.base if isinstance(arg, TensorDescriptor) else arg for arg in args)
    return sum({id(x): x.nbytes for x in tensors if isinstance(x, Tensor)}.values())


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Makes the tensors' device current, since Triton launches on the current device."""
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def compile_only(capability: int, multiprocessors: int = 3) -> Iterator[list[CompiledLaunch]]:
    """Compiles every kernel launched in the block for sm_`capability` (80, 90, 100, …), without a GPU that has so many
    multiprocessors.

    Call launchers, not ops, with tensors on the meta device: shapes, dtypes and strides then specialise the kernels as
    real inputs would. Not for a process that also runs kernels.
    """
    global _compiled, _target
    assert _compiled is None, "compile_only does not nest"
    active = driver._active
    driver.set_active(_TargetOnly(GPUTarget("cuda", capability, 32)))
    _compiled, _target = [], Target(capability, multiprocessors)
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
