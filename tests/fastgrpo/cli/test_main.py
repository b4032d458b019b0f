"""What a user sees: exit codes, and one clear line for each thing that can be wrong."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastgrpo import __version__
from fastgrpo.cli import train as train_command
from fastgrpo.cli.main import COMMANDS, main

Train = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def train(tiny_model_dir: Path, sat_file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """`fastgrpo train` of two prompts × 2 completions of 3 tokens a step; gives (exit code, lines on stderr)."""

    def run(*flags: Any, without: Sequence[str] = ()) -> tuple[int, list[str]]:
        settings = {
            "--model_name_or_path": tiny_model_dir, "--dataset_name": sat_file, "--output_dir": out,
            "--num_generations": 2, "--per_device_train_batch_size": 4, "--max_completion_length": 3,
            "--max_steps": 1, "--report_to": "none", "--save_strategy": "no", "--use_cpu": "true",
        }  # fmt: skip
        base = [token for name, value in settings.items() if name not in without for token in (name, value)]
        code = main(["train", *map(str, [*base, *flags])])
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def refused(train: Train, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Runs and expects exit code 2 and one line, which it returns; before the run's banner, or right behind it."""

    def run(*flags: Any, **options: Any) -> str:
        code, lines = train(*flags, **options)
        assert code == 2
        *banner, line = lines
        assert [fact.split()[0] for fact in banner] in ([], ["model", "device", "rollout", "update", "prompts"])
        assert line.startswith("fastgrpo train: error: ")
        assert caplog.records == []
        return line.removeprefix("fastgrpo train: error: ")

    return run


@pytest.fixture
def data(sat_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """The first rows of the training file, some of them changed: {row: {column: value}}."""

    def write(count: int = 4, changes: dict[int, dict[str, Any]] | None = None) -> Path:
        table = pq.read_table(sat_file)
        rows = table.slice(0, count).to_pylist()
        for index, columns in (changes or {}).items():
            rows[index] |= columns
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
        return path

    return write


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of reward functions gone wrong."""
    (tmp_path / "odd_rewards.py").write_text(
        "def nan(completions, **_): return [1.0] * (len(completions) - 1) + [float('nan')]\n"
        "def short(completions, **_): return [1.0]\n"
        "def raising(completions, **_): raise KeyError('no such\\nkey')\n"
        "def words(completions, **_): return ['good'] * len(completions)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "odd_rewards"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Commands


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"fastgrpo {__version__}\n")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "fastgrpo: unknown command 'trian' (did you mean train?)\n"
    assert main(["xyz"]) == 2
    assert capsys.readouterr().err == f"fastgrpo: unknown command 'xyz': use {', '.join(COMMANDS)}\n"


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "run", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "fastgrpo train: interrupted\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="required"):
        main(["train"])


# Settings


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
        (["--max_pixels", "-4"], "max_pixels=-4 must be positive"),
        (["--max_samples", "0"], "max_samples=0 is not valid: use 1 or more"),
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
    file.write_text("num_generations: 1\n")
    assert "num_generations=1" in refused("--config", file, without=["--num_generations"])


def test_output_folder_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below"):
        assert f"output_dir='{folder}' cannot be written" in refused("--output_dir", folder)
    assert file.read_text() == "mine"


# The data


def test_missing_data_file(refused: Callable[..., str]) -> None:
    assert "dataset_name='nowhere.parquet': no such file or folder" in refused("--dataset_name", "nowhere.parquet")


def test_missing_evaluation_file(refused: Callable[..., str]) -> None:
    assert "dataset_name='nowhere.parquet': no such file" in refused("--eval_dataset_name", "nowhere.parquet")


def test_wrong_schema_names_columns_found_and_wanted(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.parquet"
    pq.write_table(pa.table({"picture": ["a"], "text": ["b"]}), path)
    line = refused("--dataset_name", path)
    assert "has the columns picture, text, which fit no schema" in line
    assert "image_bytes, question" in line


def test_empty_data_set(refused: Callable[..., str], data: Callable[..., Path], tmp_path: Path) -> None:
    assert "has no rows" in refused("--dataset_name", data(count=0))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "has no rows" in refused("--dataset_name", empty)


def test_data_that_is_no_parquet(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet at all")
    assert "cannot be read" in refused("--dataset_name", path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_bytes": [b"no picture"]}, "image 1 of 1: image cannot be decoded: its format is unknown"),
        ({"image_bytes": [b"\x89PNG\r\n\x1a\n"]}, "image 1 of 1: image cannot be decoded"),
        ({"image_bytes": []}, "image_bytes is empty"),
        ({"correct_answer": "purple"}, "correct_answer 'purple' is not among the answers"),
        ({"question": "Is <|image_pad|> here?"}, "the text holds the special token <|image_pad|>"),
        ({"question": "far and near " * 400}, "is longer than max_prompt_length=400"),
    ],
)
def test_a_bad_row_is_skipped_named_once_and_counted(
    train: Train,
    data: Callable[..., Path],
    out: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    reason: str,
) -> None:
    file = data(4, {2: change})
    # Two epochs of two steps, two rows each: row 2 comes up twice.
    flags = ["--dataset_name", file, "--no_shuffle_dataset", "--max_steps", 4, "--max_prompt_length", 400]
    code, lines = train(*flags)
    assert code == 0, lines
    assert [line["skipped_rows"] for line in metrics(out)] == [0, 1, 1, 2]
    [message] = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert message.startswith("row 2 skipped: ")
    assert reason in message
    rows = [pq.read_table(out / "completions" / f"completions_{n:05d}.parquet").column("row_id") for n in (1, 2, 3, 4)]
    assert [column.to_pylist() for column in rows] == [[0, 0, 1, 1], [3, 3], [0, 0, 1, 1], [3, 3]]


@pytest.mark.parametrize(
    ("change", "flags", "reason"),
    [
        ({"image_bytes": [b"no picture"]}, [], "row 0: image 1 of 1: image cannot be decoded"),
        ({"correct_answer": "purple"}, [], "row 0: correct_answer 'purple' is not among the answers"),
        ({}, ["--max_prompt_length", "5"], "is longer than max_prompt_length=5"),
    ],
)
def test_no_good_row_at_all(
    refused: Callable[..., str], data: Callable[..., Path], change: dict[str, Any], flags: list[str], reason: str
) -> None:
    line = refused("--dataset_name", data(4, dict.fromkeys(range(4), change)), *flags)
    assert "none of the 4 rows can be used" in line
    assert reason in line


def test_a_rollout_of_bad_rows_alone_is_no_end(train: Train, data: Callable[..., Path], out: Path) -> None:
    file = data(4, {row: {"image_bytes": [b"no picture"]} for row in (0, 1)})
    code, lines = train("--dataset_name", file, "--no_shuffle_dataset", "--max_steps", 2, "--beta", 0.1)
    assert code == 0, lines
    first, second = metrics(out)
    assert (first["skipped_rows"], first["loss"], first["grad_norm"]) == (2, 0.0, 0.0)
    assert "reward" not in first
    assert (second["skipped_rows"], second["completions/mean_length"] > 0) == (2, True)


# Reward functions


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "reward function 'nan' returned nan for completion 3: return None to abstain"),
        ("short", "reward function 'short' returned 1 rewards for 4 completions"),
        ("raising", "reward function 'raising' failed on 4 completions: KeyError: 'no such\\nkey'"),
        ("words", "reward function 'words' returned 'good' for completion 0: return a number"),
        ("absent", "'odd_rewards:absent' cannot be imported"),
        ("number", "'odd_rewards:number' is a int, not a function"),
    ],
)
def test_reward_functions_gone_wrong(refused: Callable[..., str], rewards: str, name: str, message: str) -> None:
    assert message in refused("--reward_funcs", f"{rewards}:{name}")


# Checkpoints, and what is not installed


def test_checkpoint_of_weights_alone_cannot_resume(train: Train, refused: Callable[..., str], out: Path) -> None:
    code, lines = train("--save_strategy", "steps", "--save_steps", 1, "--save_only_model")
    assert code == 0, lines
    assert (out / "checkpoint-1" / "model.safetensors").is_file()
    for resume in ([out / "checkpoint-1"], []):
        assert "holds weights but no optimizer state" in refused("--resume_from_checkpoint", *resume)


def test_a_second_run_in_the_same_folder_keeps_the_first(train: Train, out: Path) -> None:
    assert train()[0] == 0
    first = (out / "metrics.jsonl").read_text()
    assert train("--seed", 1)[0] == 0
    assert (out / "previous-1" / "metrics.jsonl").read_text() == first
    assert (out / "previous-1" / "model.safetensors").is_file()
    assert [line["step"] for line in metrics(out)] == [1]


def test_missing_packages_are_one_warning_each_and_the_run_goes_on(
    train: Train, out: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgrpo.config.find_spec", lambda name: None if name == "wandb" else object())
    code, lines = train("--report_to", "wandb", "--attn_implementation", "flash_attention_2", "--use_liger_kernel")
    assert code == 0, lines
    warnings = [record.getMessage() for record in caplog.records]
    for name in ("wandb", "flash_attention_2", "use_liger_kernel"):
        assert sum(name in warning for warning in warnings) == 1, warnings
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    assert [line["step"] for line in metrics(out)] == [1]


def test_report_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fastgrpo report: error: ")
