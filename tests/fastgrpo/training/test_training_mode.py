"""What the trainer asks of the model besides gradients."""

import math
from dataclasses import replace

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.trainer import GRPOTrainer


@pytest.fixture
def trainer(tiny_model_dir, sat_file, tmp_path):
    def build(**settings):
        shared = {
            "output_dir": str(tmp_path),
            "batch_unit": "prompts",
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 4,
            "max_steps": 2,
            "beta": 0.04,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
        }
        return GRPOTrainer(str(tiny_model_dir), "format", GRPOConfig(**(shared | settings)), load_rows(str(sat_file)))

    return build


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_checkpointing_runs_each_layer_again_in_the_backward_pass(trainer, checkpointing, passes):
    trainer = trainer(gradient_checkpointing=checkpointing, max_steps=1)
    calls = []
    layer = trainer.model.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert sum(calls) == passes


def test_a_loss_that_is_not_finite_is_logged_and_counts_as_a_step(trainer):
    trainer = trainer(on_nonfinite="skip")
    accumulate = trainer.updater.accumulate
    trainer.updater.accumulate = lambda groups: replace(accumulate(groups), loss=torch.tensor(math.nan))
    trainer.train()
    lines = trainer.run_log.metrics_file.read_text().splitlines()
    assert len(lines) == 2


def test_a_step_that_trains_on_nothing_logs_no_means(trainer):
    trainer = trainer(beta=0.0)
    trainer.train()
    line = trainer.run_log.metrics_file.read_text().splitlines()[0]
    assert '"loss"' in line
    assert '"entropy"' not in line
