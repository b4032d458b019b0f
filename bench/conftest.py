"""How the pytest-benchmark suites of this folder time what they time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import synchronize

# Ratios depend on the number of threads: they are committed for one.
torch.set_num_threads(1)


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """`timed(role, function, rounds)`: `function()`, waited for on a GPU; `role` is for `gate.py`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(role: str, function: Callable[[], Any], rounds: int) -> None:
        def call() -> None:
            function()
            synchronize(device)

        benchmark.extra_info["role"] = role
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)

    return run
