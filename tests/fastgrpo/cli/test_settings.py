"""Settings that cannot work: one line each, before anything is loaded or right after."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_generatons", "4"], "unknown argument --num_generatons (did you mean --num_generations?)"),
        (["--num_generations", "two"], "invalid int value: 'two'"),
        (["--num_generations", "1"], "num_generations=1 is not valid: use 2 or more"),
        (
            ["--num_generations", "3"],
            "num_generations=3 does not divide. Make it a multiple, or pass --batch_unit prompts",
        ),
        (["--loss_type", "ppo"], "loss_type='ppo' is not valid: use one of grpo"),
        (["--sync_ref_model"], "sync_ref_model=True, but with beta=0.0 there is no reference"),
        (["--dtype", "float99"], "--dtype"),
        (["--reward_funcs", "acuracy"], "'acuracy' is not a reward function. Use accuracy, format, length"),
        (["--reward_funcs", "no_such_module:f"], "'no_such_module:f' cannot be imported"),
        (["--reward_weights", "1"], "1 values for 2 reward functions, give one each"),
        (["--max_prompt_length", "0"], "max_prompt_length=0 is not valid: use 1 or more"),
        (["--max_pixels", "-4"], "max_pixels=-4 is not valid: use 1 or more"),
        (["--max_samples", "0"], "max_samples=0 is not valid: use 1 or more"),
        (["--lr", "1e-5"], "unknown argument --lr (did you mean --learning_rate?)"),
        (["--max_steps", "0"], "max_steps=0 is not valid"),
        (["--optim_args", "foo"], "optim_args='foo' is not valid: use name=value"),
        (["--deepspeed", "nowhere.json"], "deepspeed='nowhere.json': there is no such file"),
        (["--model_init_kwargs", "{bad"], "model_init_kwargs='{bad' is not JSON: "),
        (["--model_init_kwargs", '{"foo": 1}'], "model_init_kwargs={'foo': 1} do not fit: "),
        (["--lr_scheduler_kwargs", "{"], "lr_scheduler_kwargs='{' is not JSON: "),
        (["--dataset_train_split", "tset"], "dataset_train_split: "),
        (["--dataset_config", "x"], "is a file, which has neither splits nor configurations"),
        (["--lora_r", "4"], "lora_r: set without use_peft"),
        (["--use_peft", "--lora_dropout", "2"], "lora_dropout=2.0 is not valid: use a number from 0 to 1"),
        (["--use_peft", "--lora_modules_to_save", "mergr"], "has no module 'mergr' (did you mean merger?)"),
        (["--use_peft", "--lora_target_modules", "q_proj", "nothing"], "has no module 'nothing'"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy='steps' needs rows: set eval_dataset_name"),
        (["--load_best_model_at_end"], "needs evaluations to choose by: set eval_strategy"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path='./nowhere' is neither a folder nor a model"),
        (["--resume_from_checkpoint", "runs/none"], "resume_from_checkpoint='runs/none' is not a folder"),
        (["--per_device_train_batch_size", "256"], "has 64 rows, but one rollout takes 128 prompts"),
    ],
)
def test_settings_that_cannot_work(refused: Callable[..., str], flags: list[str], message: str) -> None:
    assert message in refused(*flags)


def test_missing_flags_are_named(refused: Callable[..., str]) -> None:
    assert "required: --dataset_name" in refused(without=["--dataset_name"])


def test_yaml_config(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("bata: 0.04\n")
    assert "unknown setting bata (did you mean --beta?)" in refused("--config", file)
    file.write_text("beta: {0.04\n")
    assert "is not YAML" in refused("--config", file)
    assert "No such file" in refused("--config", tmp_path / "none.yaml")
    file.write_text("beta: 0.1\nseed: 1\nbeta: 0.2\n")
    assert "beta is given twice" in refused("--config", file)
    file.write_text("num_generations: 1\n")
    assert "num_generations=1" in refused("--config", file, without=["--num_generations"])


def test_output_folder_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below"):
        assert f"output_dir='{folder}' cannot be written" in refused("--output_dir", folder)
    assert file.read_text() == "mine"
