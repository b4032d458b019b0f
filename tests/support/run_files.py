"""What a run left in its folder, and what it changed in the model."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor


def metrics_of(folder: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def completions_of(folder: Any, step: int) -> list[dict[str, Any]]:
    """The completions drawn at a step."""
    rows: list[dict[str, Any]] = pq.read_table(
        Path(folder) / "completions" / f"completions_{step:05d}.parquet"
    ).to_pylist()
    return rows


def parameters(trainer: Any) -> dict[str, Tensor]:
    """Copies of the policy's parameters."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(before: dict[str, Tensor], trainer: Any) -> set[str]:
    """Names of the parameters that differ from `before`."""
    return {name for name, value in parameters(trainer).items() if not torch.equal(value, before[name])}


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs from completion to completion, whatever the model says."""
    return [float(sum(ids) % 7) for ids in completion_ids]
