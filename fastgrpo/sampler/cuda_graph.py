"""Captures the decode step in CUDA graphs, one per batch bucket and number of guesses."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from fastgrpo_profiling import unrecorded
from torch import Tensor


class StepGraphs:
    """Captures a step at its first use; all graphs share one memory pool.

    A rollout usually starts with its largest bucket, so smaller ones reuse its memory. Weights and buffers keep their
    addresses, so only new buffers need a new capture.
    """

    def __init__(self, finished: Tensor) -> None:
        """`finished` [R] bool: in a step such rows only write the spare last column of the drawn tokens."""
        self.finished = finished
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def replay(self, key: Hashable, step: Callable[[], None]) -> None:
        """One step of this key's sizes; it works on static buffers."""
        # `step` is not stored: a reference cycle with the owner of these graphs would keep its buffers alive.
        with torch.cuda.device(self.finished.device):
            if key not in self.graphs:
                self.graphs[key] = self._capture(step)
            self.graphs[key].replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        was_finished = self.finished.clone()
        # The warm-up steps below initialise libraries and compile kernels; they must not advance any row.
        self.finished.fill_(True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        # thread_local: other threads, such as a data loader's, may allocate during the capture.
        with unrecorded(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step()
        self.finished.copy_(was_finished)
        return graph
