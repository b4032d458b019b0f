"""How much memory is held: the CUDA allocator's, or this process's resident set."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATM, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryProbe:
    """Reads what a device holds now and its high-water mark. Nothing is ever reset, so probes do not disturb others.

    Args:
        device: "cuda" reads PyTorch's allocator; "cpu" the operating system, which costs some 10 µs a reading.
    """

    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def now(self) -> int:
        """Bytes held."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else resident_bytes()

    def peak(self) -> int:
        """Most bytes ever held."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident_bytes()


def resident_bytes() -> int:
    """Bytes of this process in memory; its high-water mark where /proc is missing."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most bytes this process ever had in memory."""
    if _STATUS.exists():  # rusage would also count the process that started this one
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
