"""What summary.json holds: a run's figures, from the files it left."""

import json
import math
from pathlib import Path
from typing import Any

import torch


def summarise(output_dir: Path, *, seed: int, wall_s: float) -> dict[str, Any]:
    """A run's figures; fractions for rates, None for what was not measured."""
    before, after = (_read_json(output_dir / "evals" / f"{name}.json") for name in ("before", "after"))
    steps = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = math.fsum(step["step_time"] for step in steps)
    drawn = math.fsum(step["tokens_per_second"] * step["step_time"] for step in steps)
    pass_at_k = before.get("pass_at_k")
    by_task_before, by_task_after = before.get("accuracy_by_task", {}), after.get("accuracy_by_task", {})
    return {
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "answered_accuracy_before": before.get("answered_accuracy"),
        "answered_accuracy_after": after.get("answered_accuracy"),
        "answered_rate_before": before.get("answered_rate"),
        "answered_rate_after": after.get("answered_rate"),
        "answered_accuracy_shuffled_images": after.get("answered_accuracy_shuffled_images"),
        "chance": after.get("chance"),
        **({f"pass_at_{pass_at_k['k']}_before": pass_at_k["value"]} if pass_at_k else {}),
        "accuracy_by_task": {
            task: {
                "before": by_task_before.get(task, {}).get("accuracy"),
                "after": score["accuracy"],
                "chance": score["chance"],
                "count": score["count"],
            }
            for task, score in by_task_after.items()
        },
        "mean_length_before": before.get("mean_length"),
        "mean_length_after": after.get("mean_length"),
        "reflection_rate_before": before.get("reflection_rate"),
        "reflection_rate_after": after.get("reflection_rate"),
        "steps": steps[-1]["step"] if steps else 0,
        "wall_s": wall_s,
        "train_s": seconds,
        "tokens_per_s": drawn / seconds if seconds else None,
        "seed": seed,
        "torch": torch.__version__,
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
