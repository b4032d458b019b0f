"""`fastgrpo eval`: what it prints, writes and refuses."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fastgrpo.cli.inference import prompts_of
from fastgrpo.cli.main import main
from fastgrpo.cli.scoring import print_evaluation
from fastgrpo.evaluation.figures import Evaluation, TaskScore


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def score(
    tiny_model_dir: Path, cvbench_file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`fastgrpo eval` of 6 questions; gives (exit code, stdout, stderr)."""

    def run(*flags: Any, model: Any = tiny_model_dir, dataset: Any = cvbench_file) -> tuple[int, str, str]:
        base = [model, dataset, "--output_dir", out, "--max_samples", 6, "--max_new_tokens", 3, "--device", "cpu"]
        code = main(["eval", *map(str, [*base, *flags])])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_eval_prints_and_writes(score: Callable[..., tuple[int, str, str]], out: Path) -> None:
    code, printed, errors = score("--pass_at_k", 2, "--shuffles", 1, "--name", "base")
    assert code == 0, errors
    assert "total" in printed
    assert "pass@2: 0.0%" in printed
    figures = json.loads((out / "evals" / "base.json").read_text())
    assert (figures["num_questions"], figures["shuffled"]["count"]) == (6, 6)
    assert pq.read_table(out / "evals" / "base.parquet").num_rows == 6


def test_no_name_is_cut_off_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    score = TaskScore(2638, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    print_evaluation(Evaluation(score, {"Relative_Depth": score, "Spatial_Relation": score}), Console(width=80))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("Relative_Depth", "Spatial_Relation", "unreadable"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "./nowhere"}, "model_name_or_path='./nowhere' is neither a folder nor a model"),
        ({"dataset": "nowhere.parquet"}, "dataset_name='nowhere.parquet': no such file or folder"),
    ],
)
def test_eval_of_what_is_missing(
    score: Callable[..., tuple[int, str, str]], arguments: dict[str, str], message: str
) -> None:
    code, _, errors = score(**arguments)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert errors.startswith("fastgrpo eval: error: ")
    assert message in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "argument --batch_size: 0 is not 1 or more"),
        (["--max_samples", "some"], "argument --max_samples: 'some' is not a whole number"),
        (["--pass_at_k", "-1"], "argument --pass_at_k: -1 is not 0 or more"),
        (["--device", "toaster"], "--device 'toaster' cannot be used here"),
        (["--dtype", "int3"], "dtype='int3' is unknown"),
        (["--min_pixels", "99999999"], "exceeds max_pixels"),
        (["--name", "a/b"], "--name a/b is no plain file name"),
        (["--split", "nope"], "is a file, which has neither splits nor configurations"),
        (["--benchmark", "cv"], "argument --benchmark: invalid choice: 'cv'"),
        (["--shufles", "1"], "unknown argument --shufles (did you mean --shuffles?)"),
    ],
)
def test_eval_flags_that_do_not_fit(score: Callable[..., tuple[int, str, str]], flags: list[str], message: str) -> None:
    code, _, errors = score(*flags)
    assert (code, len(errors.splitlines())) == (2, 1), errors
    assert message in errors


def test_eval_of_a_folder_without_weights(
    score: Callable[..., tuple[int, str, str]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    code, _, errors = score(model=folder)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "has no usable safetensors weights" in errors


def test_eval_of_other_data(score: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "How many?"}\n')
    code, _, errors = score(dataset=path)
    assert code == 2
    mode, error = errors.splitlines()
    assert mode == "questions are asked in base mode, template paper"
    assert "has no `solution` to score against" in error


def test_eval_output_that_cannot_be_written(score: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, errors = score("--output_dir", tmp_path / "file")
    assert code == 2
    assert "cannot be written" in errors


def test_eval_asks_as_the_run_that_trained_the_model_did(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "settings.json").write_text(json.dumps({"prompt_mode": "instruct", "prompt_template": "answer"}))
    unsaid = {"prompt_mode": None, "prompt_template": None}
    for model in (tmp_path, tmp_path / "checkpoint-5"):
        asked = prompts_of(Namespace(model=str(model), **unsaid))
        assert asked == {"prompt_mode": "instruct", "prompt_template": "answer"}
    told = prompts_of(Namespace(model=str(tmp_path), **unsaid | {"prompt_mode": "base"}))
    assert told == {"prompt_mode": "base", "prompt_template": "answer"}
    (tmp_path / "model").mkdir()
    assert prompts_of(Namespace(model=str(tmp_path / "model"), **unsaid))["prompt_mode"] == "base", "not its parent's"
    elsewhere = prompts_of(Namespace(model="someone/model", **unsaid))
    assert elsewhere == {"prompt_mode": "base", "prompt_template": "paper"}


def test_settings_that_are_no_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not JSON"):
        prompts_of(Namespace(model=str(tmp_path), prompt_mode=None, prompt_template=None))
