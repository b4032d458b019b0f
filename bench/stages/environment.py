"""What the figures were measured on."""

import os
import platform
import shutil
from collections.abc import Iterator

import torch
from harness import Result, said, versions

GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "ecc.mode.current",
)


def run(scale: str, device: str) -> Iterator[Result]:
    """Machine, driver and versions; a matrix product on the device, so that a broken one is known at once."""
    result = Result("environment", device)
    ones = torch.ones(64, 64, device=device)
    result.checks["the device multiplies"] = bool((ones @ ones == 64).all())
    result.figures = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "free_disk_gb": shutil.disk_usage(".").free / 1e9,
        **versions(),
    }
    if device == "cuda":
        told = said("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader").splitlines()
        properties = torch.cuda.get_device_properties(0)
        result.figures |= {
            "gpus": told,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "free_bytes": torch.cuda.mem_get_info()[0],
        }
    yield result
