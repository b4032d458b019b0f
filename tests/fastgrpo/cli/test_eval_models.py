"""`fastgrpo eval` of several models, in several processes, interrupted, and with the published evaluators' flags."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from fastgrpo.cli.eval import labels_of
from fastgrpo.cli.eval_flags import read_flags
from fastgrpo.cli.main import main
from fastgrpo.evaluation.answer_log import AnswerLog

Score = Callable[..., str]
FLAGS = ["--max_samples", "8", "--max_new_tokens", "4", "--device", "cpu"]


@pytest.fixture
def score(cvbench_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """`fastgrpo eval` of 8 CV-Bench questions; gives what it prints."""

    def run(*flags: Any, out: Path = tmp_path / "out", code: int = 0) -> str:
        base = ["--benchmark", "cvbench", "--data", cvbench_file, "--output_dir", out, *FLAGS]
        found = main(["eval", *map(str, [*flags, *base])])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.out + printed.err

    return run


def answers(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def test_a_model_and_its_adapters(score: Score, tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    printed = score(tiny_model_dir, adapter_dir, "--prompt_template", "answer")
    out = tmp_path / "out"
    assert {path.name for path in (out / "evals").iterdir()} == {
        f"cvbench-{model}.{kind}" for model in ("tiny", "lora") for kind in ("json", "parquet")
    }
    figures = json.loads((out / "cvbench-comparison.json").read_text())
    assert list(figures["models"]) == ["tiny", "lora"]
    assert figures["paired_tests"][0]["count"] == 8
    assert "lora against tiny: " in printed
    page = (out / "cvbench-comparison.html").read_text()
    command = f"fastgrpo eval {tiny_model_dir} {adapter_dir} --prompt_template answer --benchmark cvbench"
    assert command in page, "it can be repeated from its page"
    assert f"<dt>torch</dt><dd>{torch.__version__}</dd>" in page
    for name in ("tiny", "lora"):
        accuracy = figures["accuracy"][name]
        assert f"{100 * accuracy['value']:.1f}" in page
    ours, base = (answers(out / "evals" / f"cvbench-{model}.parquet") for model in ("lora", "tiny"))
    assert [row["completion"] for row in ours] != [row["completion"] for row in base], "the adapters are in it"
    score(adapter_dir, "--name", "alone", "--prompt_template", "answer")
    assert answers(out / "evals" / "alone.parquet") == ours


def test_models_are_told_apart_by_names_that_files_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/m", "y/m", "x-m"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x")
    labels = labels_of(["m", "../y/m", "../x-m"])
    assert len({label.replace("/", "-") for label in labels}) == 3
    assert labels_of([".", "Qwen/m"]) == ["x", "m"]
    with pytest.raises(ValueError, match=r"\./m is named twice"):
        labels_of(["m", "./m"])


def test_the_last_name_is_the_data_set_unless_it_is_named(tmp_path: Path) -> None:
    _, target = read_flags(["one", "two", "data.parquet"])
    assert (target.models, target.data, target.benchmark, target.name) == (["one", "two"], "data.parquet", None, "eval")
    _, target = read_flags(["one", "two", "--data", "data.parquet"])
    assert (target.models, target.data) == (["one", "two"], "data.parquet")
    _, target = read_flags(["--benchmark", "blink", "one", "two"])
    assert (target.models, target.data, target.name, target.title) == (["one", "two"], None, "blink", "BLINK")


def test_a_wrong_name_is_told_before_any_model_is_asked(score: Score, tiny_model_dir: Path) -> None:
    printed = score(tiny_model_dir, "./nowhere", code=2)
    assert "model_name_or_path='./nowhere' is neither" in printed
    assert "scoring" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model"], "asked about what?"),
        ([], "asked about what?"),
        (["--benchmark", "sat"], "no model is named"),
        (["a/b", "a/b", "--benchmark", "sat"], "a/b is named twice"),
    ],
)
def test_commands_that_name_too_little(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main(["eval", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_flags_of_the_published_evaluators(capsys: pytest.CaptureFixture[str]) -> None:
    options, target = read_flags(["--model_path", "org/model", "--bs", "8", "--use_reasoning_prompt"])
    assert (target.models, target.benchmark, options.batch_size) == (["org/model"], "cvbench", 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "flags of the published evaluators: --model_path is MODEL; --bs is --batch_size; --use_reasoning_prompt is "
        "--prompt_template paper; without a data set, CV-Bench is asked"
    )
    assert read_flags(["m", "--benchmark", "sat", "--no-use_reasoning_prompt"])[0].prompt_template == "direct"


def test_an_interrupted_command_goes_on(
    score: Score, tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = (tiny_model_dir, adapter_dir, "--pass_at_k", 2)
    score(*models, out=tmp_path / "whole")
    add, added = AnswerLog.add, []

    def add_some(log: AnswerLog, *answer: Any) -> None:
        add(log, *answer)
        added.append(answer)
        if len(added) == 20:  # all 16 of the first model, greedy and sampled; 4 of the second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add", add_some)
        score(*models, code=130)
    evals = tmp_path / "out" / "evals"
    assert {path.name for path in evals.glob(".*")} == {".cvbench-tiny.answers", ".cvbench-lora.answers"}
    printed = score(*models)
    assert "16 answers of an interrupted evaluation are kept" in printed
    assert "4 answers of an interrupted evaluation are kept" in printed
    assert not list(evals.glob(".*"))
    for file in ("cvbench-tiny", "cvbench-lora"):
        assert answers(evals / f"{file}.parquet") == answers(tmp_path / "whole" / "evals" / f"{file}.parquet")
        assert (evals / f"{file}.json").read_text() == (tmp_path / "whole" / "evals" / f"{file}.json").read_text()


def test_two_ranks_equal_one(score: Score, tiny_model_dir: Path, cvbench_file: Path, tmp_path: Path) -> None:
    flags = ["--pass_at_k", "2", "--shuffles", "1"]
    score(tiny_model_dir, *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["eval", "--benchmark", "cvbench", "--data", str(cvbench_file), "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [*torchrun, "-m", "fastgrpo", *command, str(tiny_model_dir), *FLAGS, *flags],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    for name in ("evals/cvbench.json", "cvbench-comparison.json"):
        # gloo now and then aborts at tear-down, when all is written.
        assert (tmp_path / "two" / name).exists(), result.stderr[-3000:]
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "out" / name).read_text()
    one, two = (answers(tmp_path / out / "evals" / "cvbench.parquet") for out in ("out", "two"))
    assert one == two
    assert result.stderr.count("questions are asked in base mode") == 1, "one rank speaks"
