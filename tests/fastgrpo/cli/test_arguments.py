from pathlib import Path

import pytest

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.run_arguments import ScriptArguments
from fastgrpo.config import GRPOConfig

NAMES = ["--model_name_or_path", "model", "--dataset_name", "data.parquet"]


@pytest.fixture
def required(tmp_path: Path) -> list[str]:
    return [*NAMES, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"]


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_flags_fill_both_records(required: list[str]) -> None:
    config, script = parse([*required, "--beta", "0.04", "--max_pixels=401408", "--reward_funcs", "format", "length"])
    assert isinstance(config, GRPOConfig)
    assert isinstance(script, ScriptArguments)
    assert (config.beta, script.max_pixels, script.reward_funcs) == (0.04, 401408, ["format", "length"])
    assert (script.model_name_or_path, script.dataset_name) == ("model", "data.parquet")


def test_reward_functions_of_the_recipe_are_the_default(required: list[str]) -> None:
    assert parse(required)[1].reward_funcs == ["accuracy", "format"]


@pytest.mark.parametrize(
    ("flags", "value"),
    [([], False), (["--bf16"], True), (["--bf16", "true"], True), (["--bf16", "0"], False), (["--bf16=1"], True)],
)
def test_bf16_needs_no_value(required: list[str], flags: list[str], value: bool) -> None:
    assert parse([*required, *flags])[0].bf16 is value


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "last"),
        (["--resume_from_checkpoint", "--beta", "0.1"], "last"),
        (["--resume_from_checkpoint", "runs/a/checkpoint-5"], "runs/a/checkpoint-5"),
        (["--resume_from_checkpoint=runs/a/checkpoint-5"], "runs/a/checkpoint-5"),
    ],
)
def test_resume_without_a_folder_means_the_last(required: list[str], flags: list[str], value: str | None) -> None:
    assert parse([*required, *flags])[0].resume_from_checkpoint == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_generation", "4"], r"unknown argument --num_generation \(did you mean --num_generations\?\)"),
        (["--max-completion-lenght=4"], r"--max-completion-lenght \(did you mean --max-completion-length\?\)"),
        (["--qqqqqqqq", "4"], r"unknown argument --qqqqqqqq; `fastgrpo train --help` lists all"),
        (["--beta", "0.1", "0.2"], r"unknown argument 0\.2"),
        (["--num_generations", "four"], "--num_generations.*invalid int value: 'four'"),
        (["--beta", "much"], "--beta.*invalid float value: 'much'"),
        (["--freeze_vision", "perhaps"], "--freeze_vision.*perhaps"),
        (["--prompt_mode", "chat"], "--prompt_mode.*'?chat'?"),
        (["--beta"], "--beta.*expected one argument"),
        (["--config"], "--config needs a file"),
    ],
)
def test_flags_that_do_not_fit(required: list[str], flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse([*required, *flags])
    assert len(str(error.value).splitlines()) == 1


def test_a_misspelt_required_flag_is_named() -> None:
    with pytest.raises(ValueError, match=r"--model_name_or_pth \(did you mean --model_name_or_path"):
        parse(["--model_name_or_pth", "model", "--dataset_name", "data.parquet"])


def test_missing_required_flags_are_named() -> None:
    with pytest.raises(ValueError, match=r"required: .*model_name_or_path.*dataset_name"):
        parse([])


def test_flags_are_not_abbreviated(required: list[str]) -> None:
    with pytest.raises(ValueError, match="unknown argument --max_step"):
        parse([*required, "--max_step", "3"])


def test_yaml_sets_and_flags_override(required: list[str], tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "beta: 0.04\nnum_generations: 4\nlearning_rate: 1e-5\nlog_completions: false\nbf16: true\n"
        "reward_funcs: [format, length]\nmodel_init_kwargs: {attn_implementation: eager}\nmax_prompt_length:\n",
    )
    config, script = parse(["--config", file, *required, "--num_generations", "2", "--reward_funcs", "accuracy"])
    assert (config.beta, config.learning_rate, config.log_completions, config.bf16) == (0.04, 1e-5, False, True)
    assert config.model_init_kwargs == {"attn_implementation": "eager"}
    assert config.max_prompt_length is None
    assert (config.num_generations, script.reward_funcs) == (2, ["accuracy"])


def test_flags_override_wherever_the_file_stands(required: list[str], tmp_path: Path) -> None:
    file = write(tmp_path, "beta: 0.04\nlog_completions: true\n")
    config, _ = parse([*required, "--beta", "0.5", "--no_log_completions", f"--config={file}"])
    assert (config.beta, config.log_completions) == (0.5, False)


def test_yaml_may_hold_the_required_names(tmp_path: Path) -> None:
    file = write(tmp_path, f"model_name_or_path: m\ndataset_name: d\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    config, script = parse(["--config", file])
    assert (script.model_name_or_path, script.dataset_name, config.use_cpu) == ("m", "d", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bata: 0.04\n", r"unknown setting bata \(did you mean --beta\?\)"),
        ("beta: [0.04\n", "is not YAML: .*line 2"),
        ("just words\n", "should map setting names to values"),
        ("- beta\n", "should map setting names to values"),
        ("", "should map setting names to values"),
        ("beta: lots\n", "--beta.*invalid float value: 'lots'"),
    ],
)
def test_yaml_that_does_not_fit(required: list[str], tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse([*required, "--config", write(tmp_path, text)])
    assert len(str(error.value).splitlines()) == 1


def test_yaml_file_missing_or_binary(required: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config .*nowhere\.yaml: No such file"):
        parse([*required, "--config", str(tmp_path / "nowhere.yaml")])
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00beta")
    with pytest.raises(ValueError, match=r"--config .*config\.yaml is not YAML"):
        parse([*required, "--config", str(tmp_path / "config.yaml")])
