"""Seconds and peak bytes of calls, of several sides in turn; on a GPU also of its work alone, without Python's."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastgrpo_profiling.memory import MemoryProbe

Calls = Mapping[str, Callable[[], Any]]
Clock = Callable[[], float]

CALLS = 20
"""Least number of calls in a graph."""
MOST_COPIES = 64
L2_BYTES, L2_TIMES = 50e6, 4
"""Of an H100 and an H200; inputs take turns until together they are so many times larger."""
QUEUED_PRODUCTS, PRODUCT_WIDTH = 16, 8192
"""Some 20 ms of work, behind which the host can queue its launches."""


def synchronize(device: str) -> None:
    """Waits for the device, where there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def paired_seconds(
    sides: Calls, *, rounds: int = 5, warmup: int = 1, device: str = "cpu", clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, the sides taking turns, so that a noisy machine disturbs all of them alike."""
    for function in sides.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            synchronize(device)
            start = clock()
            function()
            synchronize(device)
            times[name].append(clock() - start)
    return times


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of theirs / ours: how many times faster we are."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def spread(times: Sequence[float]) -> float:
    """(slowest − fastest) / median."""
    return (max(times) - min(times)) / statistics.median(times)


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Peak memory of one call above what was held before it: CUDA's allocator, or this process's resident set."""
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    probe = MemoryProbe(device)
    before = probe.now()
    function()
    synchronize(device)
    return probe.peak() - before


def in_fresh_process(*arguments: str) -> Any:
    """Runs this script again with `arguments`; the last line it prints is its JSON answer.

    glibc is told to map large blocks, so that what is freed is returned and peak memory is repeatable.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, sys.argv[0], *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


class CapturedCalls:
    """Several calls in one CUDA graph, as a decode step's are.

    Raises:
        RuntimeError: one of them waits for the device, so that they cannot be captured.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what has to be compiled
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.count = len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def seconds(self) -> float:
        """Of one call, by one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.count


def copies_for(read_bytes: float) -> int:
    """How many inputs must take turns so that none is found in the L2 cache: other layers' work lies between."""
    return max(1, min(MOST_COPIES, round(L2_TIMES * L2_BYTES / max(read_bytes, 1.0))))


def kernel_seconds(
    sides: Mapping[str, Callable[[Any], Any]], inputs: Sequence[Any], *, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of a call of each side on a GPU, the sides taking turns; and why a side could not be captured.

    Args:
        inputs: alike, at addresses of their own; calls take them in turn.
    """
    captured, faults = {}, {}
    passes = -(-CALLS // len(inputs))
    for name, side in sides.items():
        calls = [lambda side=side, one=one: side(one) for one in inputs] * passes  # type: ignore[misc]
        try:
            captured[name] = CapturedCalls(calls)
            captured[name].seconds()
        except RuntimeError as error:
            captured.pop(name, None)
            faults[name] = " ".join(str(error).split())[:200]
    times: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(rounds):
        for name, graph in captured.items():
            times[name].append(graph.seconds())
    return times, faults


def queued_seconds(call: Callable[[], Any], *, rounds: int, device: str) -> list[float]:
    """Seconds of each call on the device: launched while earlier work still runs, so that no kernel waits for Python.

    On a CPU, where Python's part is the work's own, the call's.
    """
    call()
    if device != "cuda":
        return paired_seconds({"call": call}, rounds=rounds, warmup=0)["call"]
    left, right = torch.randn(2, PRODUCT_WIDTH, PRODUCT_WIDTH, device="cuda", dtype=torch.bfloat16)
    product, times = torch.empty_like(left), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(QUEUED_PRODUCTS):
            torch.mm(left, right, out=product)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times
