"""Whole runs, as a user starts them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.train import run_training

TRL_NAMES = {
    *("num_tokens", "step_time", "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl"),
    *(f"completions/{statistic}_length" for statistic in ("mean", "min", "max")),
    *(f"completions/{statistic}_terminated_length" for statistic in ("mean", "min", "max")),
    "completions/clipped_ratio",
    *(f"rewards/tagged_{name}/{statistic}" for name in ("accuracy", "format") for statistic in ("mean", "std")),
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
    *(f"sampling/sampling_logp_difference/{statistic}" for statistic in ("mean", "max")),
    *(f"sampling/importance_sampling_ratio/{statistic}" for statistic in ("min", "mean", "max")),
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.skipif(find_spec("wandb") is not None, reason="the command reports to wandb")
def test_the_published_command_runs_as_written_and_says_nothing_needless(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path
) -> None:
    """The flags of VisualThinker-R1-Zero's run_grpo_SAT.sh, but for the model, the file and the lengths."""
    out = tmp_path / "out"
    command = f"""train --output_dir {out} --model_name_or_path {tiny_model_dir} --dataset_name {sat_file}
        --max_prompt_length 1024 --max_completion_length 6 --per_device_train_batch_size 1
        --gradient_accumulation_steps 2 --logging_steps 1 --bf16 --gradient_checkpointing 1
        --attn_implementation flash_attention_2 --max_pixels 401408 --num_train_epochs 2
        --run_name Qwen2-VL-2B-GRPO-SAT --save_steps 100 --save_only_model true --report_to wandb --max_steps 2"""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo", *command.split()],
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    wandb, mapped, attention, *banner, warning, first, second, summary, report = done.stderr.splitlines()
    assert wandb == "report_to: wandb not installed; metrics go to metrics.jsonl and TensorBoard instead."
    assert mapped.startswith("per_device_train_batch_size=1 is taken for prompts (--batch_unit prompts)")
    assert attention.startswith("attn_implementation=flash_attention_2 is not available")
    assert [line.split()[0] for line in banner] == ["model", "device", "rollout", "update", "prompts"]
    assert warning.endswith("pass --bf16 false to compute in the model's own dtype")
    assert first.startswith("step 1/2  reward ")
    assert second.startswith("step 2/2  reward ")
    assert summary == f"summary: {out / 'summary.json'}"
    assert report == f"report:  {out / 'report.html'}"
    # one prompt a micro-batch × 2 accumulated, 8 completions each
    completions = pq.read_table(out / "completions" / "completions_00002.parquet").to_pylist()
    assert [row["index"] for row in completions] == [*range(8)] * 2
    assert [line["step"] for line in metrics(out)] == [1, 2]
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    assert not list((out / "checkpoint-2").glob("optimizer*"))
    for folder in (out, out / "checkpoint-2"):
        _, loading = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]


@pytest.fixture
def arguments(tiny_model_dir: Path, sat_file: Path, cvbench_file: Path, tmp_path: Path) -> list[str]:
    settings = {
        "model_name_or_path": tiny_model_dir, "dataset_name": sat_file, "output_dir": tmp_path / "out",
        "eval_dataset_name": cvbench_file, "eval_max_samples": 8, "eval_max_new_tokens": 3, "eval_pass_at_k": 2,
        "max_completion_length": 3, "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 2,
        "save_steps": 1, "beta": 0.04, "report_to": "none", "use_cpu": "true", "seed": 3,
    }  # fmt: skip
    return [token for name, value in settings.items() for token in (f"--{name}", str(value))]


def test_a_run_with_scores_before_and_after(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run_training(*parse(arguments))
    assert summary == read(out / "summary.json")
    assert (summary["steps"], summary["seed"]) == (2, 3)
    assert {"accuracy_before", "accuracy_after", "chance", "pass_at_2_before", "tokens_per_s", "wall_s"} <= set(summary)
    before, after = read(out / "evals" / "before.json"), read(out / "evals" / "after.json")
    assert (before["step"], after["step"], before["num_questions"], after["num_questions"]) == (0, 2, 8, 8)
    assert (before["pass_at_k"]["k"], before["shuffled"]) == (2, None)
    assert (after["pass_at_k"], after["shuffled"]["count"]) == (None, 8)
    lines = metrics(out)
    for line in lines:
        assert set(line) >= TRL_NAMES | {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
        assert set(line) >= {"skipped_rows", "reflection_rate", "time/rollout", "time/reward"}
    assert lines[1]["num_tokens"] > lines[0]["num_tokens"] > 0
    settings = read(out / "settings.json")
    assert (settings["beta"], settings["dataset_name"], settings["eval_pass_at_k"]) == (0.04, arguments[3], 2)
    assert "<html" in (out / "report.html").read_text()

    # Resumed at step 1: the score before training stands, the last step and what follows it are made again.
    (out / "evals" / "after.json").unlink()
    scored_at = (out / "evals" / "before.json").stat().st_mtime_ns
    resumed = run_training(*parse([*arguments, "--resume_from_checkpoint", str(out / "checkpoint-1")]))
    assert (out / "evals" / "before.json").stat().st_mtime_ns == scored_at
    assert [path.name for path in out.glob("previous-1/*")] == ["checkpoint-2"], "of the branch that was left"
    assert [line["step"] for line in metrics(out)] == [1, 2]
    assert metrics(out)[1]["entropy"] == lines[1]["entropy"]
    assert resumed["accuracy_after"] == summary["accuracy_after"]


def test_too_few_rows_are_told_before_anything_is_scored(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 64 rows, but one rollout takes 128 prompts"):
        run_training(*parse([*arguments, "--per_device_train_batch_size", "256"]))
    assert not (tmp_path / "out" / "evals").exists()
