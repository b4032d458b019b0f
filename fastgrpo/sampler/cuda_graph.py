"""The decode step captured in CUDA graphs, one for each batch bucket."""

from collections.abc import Callable
from typing import Any

import torch
from fastgrpo_profiling import unrecorded
from torch import Tensor


class StepGraphs:
    """Captures a bucket's step when it is first asked for; all graphs share one memory pool.

    A rollout most often starts with its largest bucket, whose memory the smaller ones then live in. Weights and buffers
    keep their addresses: only new buffers are captured anew.
    """

    def __init__(self, finished: Tensor) -> None:
        """Rows that are `finished` [R] change nothing in a step but the spare last column of what is drawn."""
        self.finished = finished
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def replay(self, rows: int, step: Callable[[int], None]) -> None:
        """One step of the first `rows` rows; `step(rows)` works on static buffers."""
        # `step` is not kept: it belongs to the owner of these graphs, whose buffers a cycle would keep alive.
        with torch.cuda.device(self.finished.device):
            if rows not in self.graphs:
                self.graphs[rows] = self._capture(rows, step)
            self.graphs[rows].replay()

    def _capture(self, rows: int, step: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        was_finished = self.finished.clone()
        # The steps before the capture, in which libraries are set up and kernels compiled, then move nobody.
        self.finished.fill_(True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        # Other threads (a data loader's, say) may allocate meanwhile.
        with unrecorded(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step(rows)
        self.finished.copy_(was_finished)
        return graph
