"""The decode step captured in CUDA graphs, one for each batch bucket."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepGraphs:
    """Captures a bucket's step when it is first asked for; all graphs share one memory pool.

    A rollout starts with its largest bucket, so that one is captured first and the smaller ones live in its memory.
    Weights and buffers keep their addresses, so nothing is ever captured again.
    """

    def __init__(self, step: Callable[[int], None], finished: Tensor) -> None:
        """`step(rows)` works on static buffers; rows that are `finished` [R] come out of it as they went in."""
        self.step = step
        self.finished = finished
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def replay(self, rows: int) -> None:
        """One step of the first `rows` rows."""
        if rows not in self.graphs:
            self.graphs[rows] = self._capture(rows)
        self.graphs[rows].replay()

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        was_finished = self.finished.clone()
        self.finished.fill_(
            True
        )  # so that the steps before the capture (libraries set up, kernels compiled) move nobody
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(rows)
        self.finished.copy_(was_finished)
        return graph
