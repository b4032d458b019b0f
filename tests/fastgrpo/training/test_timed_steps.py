"""Every part of a step that transformers owns is in a span."""

import pytest
from fastgrpo_profiling import record

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.trainer import GRPOTrainer


@pytest.fixture
def trainer(tiny_model_dir, sat_file, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path),
        batch_unit="prompts",
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        max_steps=2,
        beta=0.04,  # so that completions of equal rewards are trained on, too
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    return GRPOTrainer(str(tiny_model_dir), "format", config, load_rows(str(sat_file)))


def test_inherited_parts_are_spans_in_each_run(trainer):
    for _ in range(2):  # the second run finds the optimizer of the first
        with record() as recorder:
            trainer.train()
        counts = {name: total.count for name, total in recorder.totals.items()}
        for name in ("data", "update/clip", "update/optimizer", "rollout", "reward", "advantages", "update/plan"):
            assert counts[name] == 2, name


def test_a_steps_own_times_are_logged(trainer):
    trainer.train()
    logged = (trainer.run_log.metrics_file).read_text()
    for name in (
        "time/data",
        "time/rollout/decode",
        "time/advantages",
        "time/update/backward",
        "time/update/optimizer",
    ):
        assert f'"{name}"' in logged, name
