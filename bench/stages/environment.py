"""What the figures were measured on, and what it can do: the floors of the other stages."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict

import torch
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, compute_dtype, print_table, said, versions

from stages import Task

GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "ecc.mode.current",
)


def run(task: Task) -> Iterator[Result]:
    """Machine, driver and versions; then FLOP/s of a large matrix product and bytes/s of a large copy."""
    device = task.device
    result, dtype = Result("environment", device), compute_dtype(device)
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
    left, right = torch.randn(2, 256, 256, device=device).to(dtype)
    exact = left.double() @ right.double()
    error = torch.linalg.norm((left @ right).double() - exact) / torch.linalg.norm(exact)
    result.checks["a product is right"] = error.item() < 1e-2
    if result.passed:
        ceilings = measure_ceilings(device, dtype)
        result.figures |= asdict(ceilings)
        rows = [["matrix product, TFLOP/s", ceilings.flops_per_s / 1e12], ["copy, GB/s", ceilings.bytes_per_s / 1e9]]
        print_table(f"Ceilings, {ceilings.dtype}", ["", "measured"], rows)
    yield result
