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
    """Reads a device's current and peak memory. Never resets the peak, so probes do not disturb each other.

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
    """Resident bytes of this process; the peak where /proc is missing."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident bytes of this process."""
    if _STATUS.exists():  # rusage would include the parent process's peak
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
