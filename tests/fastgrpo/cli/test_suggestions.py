"""What a misspelt flag was meant to be."""

from dataclasses import fields

import pytest

from fastgrpo.cli.run_arguments import ScriptArguments
from fastgrpo.cli.suggestions import SAID_FOR, nearest
from fastgrpo.config import GRPOConfig

NAMES = {field.name for record in (GRPOConfig, ScriptArguments) for field in fields(record)}
FLAGS = [f"--{name}" for name in NAMES] + [f"--{name.replace('_', '-')}" for name in NAMES if "_" in name]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--model", "--model_name_or_path"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--batch-size", "--per-device-train-batch-size"),
        ("--epochs", "--num_train_epochs"),
        ("--generations", "--num_generations"),
        ("--num_generatons", "--num_generations"),
        ("--max_step", "--max_steps"),
        ("--grad_norm", "--max_grad_norm"),
        ("--reward_func", "--reward_funcs"),
        ("--zzzzzzzz", None),
    ],
)
def test_nearest_flag(typed: str, meant: str | None) -> None:
    assert nearest(typed, FLAGS) == meant


def test_habits_lead_to_settings_that_exist() -> None:
    assert set(SAID_FOR.values()) <= NAMES
    assert not set(SAID_FOR) & NAMES
