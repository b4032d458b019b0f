"""`--profile_steps` on a training run."""

import json

import pytest
from fastgrpo_profiling.trace import problems

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.trainer import GRPOTrainer


@pytest.mark.parametrize(("steps", "traced"), [("1:1", 1), ("2:3", 2), ("3:9", 1)])
def test_the_steps_asked_for_are_traced(steps, traced, tiny_model_dir, sat_file, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path),
        batch_unit="prompts",
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        max_steps=3,
        beta=0.04,  # so that completions of equal rewards are trained on, too
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        profile_steps=steps,
    )
    trainer = GRPOTrainer(str(tiny_model_dir), "format", config, load_rows(str(sat_file)))
    trainer.train()
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert problems(trace) == []
    names = [event["name"] for event in trace["traceEvents"] if event["ph"] == "X"]
    for name in ("data", "rollout", "update/forward", "update/optimizer"):
        assert names.count(name) == traced, name
