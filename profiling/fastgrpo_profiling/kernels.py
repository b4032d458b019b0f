"""Splits a span's time by kernel names. Needed for CUDA graphs: a replay is one launch, so no span sees its parts.

On a GPU, times are those of the device's kernels, replayed ones included; on a CPU, those of PyTorch's operators,
nested ones excluded.
"""

import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_NAMES = {
    "attention": r"attention|attn|flash|fmha|sdpa|^(attend|merge)_kernel",
    "sampling": r"::sample$|multinomial|argmax|argmin|^(chunk|hot|draw|scan|winner)_kernel",
    "rope and cache": r"rope|rotary|kv_?cache|reshape_and_cache",
    "matrix products": (
        r"gemm|gemv|nvjet|xmma|cutlass|cublas|split_?k|thin_linear|::(mm|addmm|bmm|baddbmm|linear|matmul|einsum)$"
    ),
    "norms, elementwise and copies": (
        r"norm|elementwise|vectorized|reduce_kernel|silu|swiglu|gather|scatter|index|copy|mem(cpy|set)|cat_?array|^aten::"
    ),
}
KINDS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _NAMES.items()}
"""Kind → parts of names; the first match counts. Covers kernels of `fastgrpo_kernels`, PyTorch, cuBLAS (nvjet, xmma),
cuDNN and flash-attention, and operators. Attention comes first, since its kernels may be named after their matrix
products."""
OTHER_KERNELS = "other"


def kind_of(names: Iterable[str]) -> str:
    """Kind of a kernel, or of an operator: that of the outermost enclosing operator that has one."""
    for name in names:
        for kind, pattern in KINDS.items():
            if pattern.search(name):
                return kind
    return OTHER_KERNELS


def seconds_by_kind(events: Iterable[Any], device: str) -> dict[str, float]:
    """Sums up a profile.

    Args:
        events: `torch.profiler.profile.events()`.
        device: "cuda" counts kernels, copies and fills on the device; "cpu" operators.
    """
    found: dict[str, float] = {}
    for event in events:
        if device == "cuda":
            if event.device_type != DeviceType.CUDA or event.is_user_annotation:
                continue
            kind, microseconds = kind_of([event.name]), event.time_range.elapsed_us()
        else:
            kind, microseconds = kind_of(reversed(list(_outwards(event)))), event.self_cpu_time_total
        found[kind] = found.get(kind, 0.0) + microseconds / 1e6
    return found


def _outwards(event: Any) -> Iterator[str]:
    """Names of an operator and of its enclosing operators."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


class KernelWatch:
    """Listens to spans (`span.listen`) and profiles every `every`-th one of a name, on the creating thread.

    It synchronises the device around each of them, and the profiler adds overhead, so do not time such a step.
    """

    def __init__(self, name: str, device: str, every: int = 1) -> None:
        self.name, self.device, self.every = name, device, every
        self.seconds: dict[str, float] = {}
        """Kind → seconds inside the spans that were profiled."""
        self.watched = 0
        """How many spans were profiled."""
        self._seen = 0
        self._thread = threading.get_ident()
        self._open: list[profile | None] = []

    def enter(self, name: str) -> None:
        if threading.get_ident() != self._thread:
            return
        profiler = None
        if name == self.name:
            if self._seen % self.every == 0:
                profiler = self._start()
            self._seen += 1
        self._open.append(profiler)

    def exit(self) -> None:
        if threading.get_ident() != self._thread or not self._open:
            return
        profiler = self._open.pop()
        if profiler is None:
            return
        self._synchronize()
        profiler.stop()
        self.watched += 1
        for kind, seconds in seconds_by_kind(profiler.events() or (), self.device).items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def _start(self) -> profile:
        self._synchronize()
        profiler = profile(activities=[ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU])
        profiler.start()
        return profiler

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
