"""The flags of TRL's programs, beside those of its settings."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.cli.arguments import parse, parse_sft
from fastgrpo.cli.assembly import load_model, lora_config
from fastgrpo.cli.launch import launch
from fastgrpo.cli.train_help import SFT, TRAIN, Page
from fastgrpo.settings.script_arguments import ModelConfig, ScriptArguments


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    return ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--report_to", "none"]


@pytest.mark.parametrize("page", [TRAIN, SFT])
def test_all_of_model_and_data_are_known(page: Page) -> None:
    known = {one.name for record in page.records for one in fields(record)}
    theirs = {one.name for record in (ModelConfig, ScriptArguments) for one in fields(record)}
    assert theirs | {"torch_dtype", "trust_remote_code"} <= known


def test_adapters_as_trl_makes_them(named: list[str]) -> None:
    _, script = parse([*named, "--use_peft", "--lora_r", "4", "--use_dora", "--lora_target_parameters", "w", "v"])
    found = lora_config(script)
    assert found is not None
    assert (found.r, found.use_dora, found.target_parameters) == (4, True, ["w", "v"])
    assert str(found.task_type) == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("flags", "rewards"),
    [
        ([], ["accuracy", "format"]),
        (["--reward_model_name_or_path", "org/model"], ["org/model"]),
        (["--reward_model_name_or_path", "org/model", "--reward_funcs", "length"], ["org/model", "length"]),
    ],
)
def test_a_reward_model_stands_first(named: list[str], flags: list[str], rewards: list[str]) -> None:
    assert parse([*named, *flags])[1].rewards == rewards


def test_the_older_name_of_the_dtype(named: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert parse([*named, "--torch_dtype", "bfloat16"])[1].dtype == "bfloat16"
    assert caplog.messages == []
    with pytest.raises(ValueError, match="torch_dtype='int3' is not valid"):
        parse([*named, "--torch_dtype", "int3"])


@pytest.mark.parametrize(
    ("flags", "train_on_prompt"),
    [([], False), (["--completion_only_loss", "false"], True), (["--assistant_only_loss", "true"], False)],
)
def test_what_counts_in_the_loss_of_sft(named: list[str], flags: list[str], train_on_prompt: bool) -> None:
    assert parse_sft([*named, *flags])[0].train_on_prompt is train_on_prompt


def test_a_folder_has_no_revisions(named: list[str], tmp_path: Path) -> None:
    config, script = parse([*named, "--model_name_or_path", str(tmp_path), "--model_revision", "v1"])
    with pytest.raises(ValueError, match=r"model_revision='v1': .* is a folder, which has none"):
        load_model(config, script)


def test_bits_need_what_reads_them(named: list[str]) -> None:
    config, script = parse([*named, "--load_in_4bit"])
    with pytest.raises(ValueError, match="quantization_config: "):
        load_model(config, script)


def test_flags_that_are_taken_over_are_told_in_one_line(named: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config, _ = parse_sft([*named, "--packing", "--max_seq_length", "64", "--dataset_num_proc", "4"])
    assert config.max_length == 64
    (told,) = caplog.messages
    assert told.startswith("Flags taken over: ")
    for name in ("packing=True", "max_seq_length=64", "dataset_num_proc=4"):
        assert name in told


def test_a_files_env_goes_into_the_environment(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_FLAG_OF_MINE", "0")
    file = tmp_path / "config.yaml"
    file.write_text("env: {A_FLAG_OF_MINE: 3}\nnum_processes: 2\nlearning_rate: 0.5\n")
    assert parse_sft([*named, "--config", str(file)])[0].learning_rate == 0.5
    assert os.environ["A_FLAG_OF_MINE"] == "3"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes"], "--num_processes needs a value"),
        (["--num_processes", "many"], "--num_processes many is not a whole number"),
        (["--accelerate_config", "nowhere.yaml"], "--accelerate_config nowhere.yaml: there is no such file"),
    ],
)
def test_launchers_flags_that_do_not_fit(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch("train", flags)


def test_a_process_that_was_launched_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="a launcher has started this process already"):
        launch("train", ["--num_processes", "2"])


def test_flags_reach_accelerates_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    class Launcher:
        pid = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            calls.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("fastgrpo.cli.launch.subprocess.Popen", Launcher)
    file = tmp_path / "zero2.yaml"
    file.write_text("")
    assert not launch("sft", ["--max_steps", "1"])
    assert launch("sft", ["--max_steps=1", "--accelerate_config", str(file), "--num_processes=4"])
    assert calls[0][3:] == [
        *("--config_file", str(file), "--num_processes", "4", "--module", "fastgrpo", "sft", "--max_steps", "1")
    ]
