"""A run can be repeated from its card alone."""

import json
from dataclasses import asdict

from fastgrpo.cli.arguments import parse, parse_sft
from fastgrpo.report.run import read_run
from fastgrpo.report.run_card import run_card, settings_yaml


def test_the_settings_on_the_card_are_the_runs(tmp_path, tiny_model_dir, sat_file):
    flags = [
        *("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file), "--output_dir", str(tmp_path)),
        *("--reward_funcs", "format", "accuracy", "--reward_weights", "0.5", "1", "--num_generations", "4"),
        *("--per_device_train_batch_size", "8", "--learning_rate", "3e-5", "--lr_scheduler_type", "cosine"),
        *("--warmup_steps", "3", "--seed", "7", "--beta", "0.04", "--max_steps", "9", "--use_cpu", "true"),
        *("--prompt_template", "answer", "--report_to", "none", "--max_completion_length", "11"),
    ]
    config, script = parse(flags)
    settings = json.loads(json.dumps({**config.to_dict(), **asdict(script)}, default=str))
    file = tmp_path / "run.yaml"
    file.write_text(settings_yaml(settings))
    again, script_again = parse(["--config", str(file), "--output_dir", str(tmp_path)])
    assert script_again == script
    ours, theirs = again.to_dict(), config.to_dict()
    assert {name for name in theirs if theirs[name] != ours[name]} <= {"logging_dir", "run_name"}


def test_supervised_settings_are_read_by_their_own_program(tmp_path):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    config, script = parse_sft([*flags, "--learning_rate", "1e-6", "--prompt_mode", "base", "--max_length", "99"])
    settings = json.loads(json.dumps({**config.to_dict(), **asdict(script)}, default=str))
    file = tmp_path / "run.yaml"
    file.write_text(settings_yaml(settings))
    again, _ = parse_sft(["--config", str(file), "--output_dir", str(tmp_path)])
    assert (again.learning_rate, again.prompt_mode, again.max_length) == (1e-6, "base", 99)


def test_facts_of_a_run(fake_run):
    card = run_card(read_run(fake_run(seed=3)))
    facts = dict(card["facts"])
    assert facts["Rewards"] == "1 × accuracy, 1 × format"
    assert (facts["Model"], facts["Data"], facts["Seed"]) == ("Qwen/Qwen2-VL-2B", "array/SAT", "3")
    assert (facts["Hardware"], facts["Commit"]) == ("EPYC, 2 threads", "abc1234")
    assert "torch 2.13.0" in facts["Versions"]
    assert facts["Time"].replace("\N{NO-BREAK SPACE}", " ") == "59 min 1 s"


def test_no_secret_is_on_the_card():
    assert settings_yaml({"hub_token": "hf_x", "wandb_api_key": "k", "max_samples": 5}) == "max_samples: 5\n"
