"""What the machine can do, measured beside everything else: the floors of the other stages."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, print_table


def compute_dtype(device: str) -> torch.dtype:
    """What the benchmarks compute in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def run(scale: str, device: str) -> Iterator[Result]:
    """FLOP/s of a large matrix product and bytes/s of a large copy."""
    result = Result("ceilings", device)
    dtype = compute_dtype(device)
    left, right = torch.randn(2, 256, 256, device=device).to(dtype)
    exact = left.double() @ right.double()
    error = torch.linalg.norm((left @ right).double() - exact) / torch.linalg.norm(exact)
    result.checks["a product is right"] = error.item() < 1e-2
    if result.passed:
        ceilings = measure_ceilings(device, dtype)
        result.figures = asdict(ceilings)
        rows = [["matrix product, TFLOP/s", ceilings.flops_per_s / 1e12], ["copy, GB/s", ceilings.bytes_per_s / 1e9]]
        print_table(f"Ceilings, {ceilings.dtype}", ["", "measured"], rows)
    yield result
