"""Rows on their way through the trainer: which are skipped, and what is said of them."""

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.config import GRPOConfig
from fastgrpo.data.row_dataset import as_rows
from fastgrpo.training.rows import build_loader
from fastgrpo.training.trainer import GRPOTrainer


def build(model: Path, out: Path, rewards: Any, rows: Any, **arguments: Any) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, report_to=[], save_strategy="no", max_steps=1, num_generations=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=2, disable_tqdm=True,
        shuffle_dataset=False, log_completions=False,
    )  # fmt: skip
    return GRPOTrainer(str(model), rewards, config, rows, **arguments)


ROWS = [
    {"problem": "How many?", "solution": [3]},
    {"problem": "How many?", "solution": {"unreadable": 1}},
    {"problem": "How many?", "solution": 2.0},
    {"problem": "How many?", "solution": "<answer> 3 </answer>"},
]


def metrics(folder: Path) -> dict[str, Any]:
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_golds_that_cannot_be_read_are_skipped_and_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    build(tiny_model_dir, tmp_path, "accuracy", ROWS).train()
    assert metrics(tmp_path)["skipped_rows"] == 1.0
    assert metrics(tmp_path)["rewards/tagged_accuracy/mean"] == 0.0


def test_no_gold_at_all_is_told_before_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 1 rows can be used; row 0: solution is \{'unreadable': 1\}"):
        build(tiny_model_dir, tmp_path, "accuracy", ROWS[1:2])


def test_other_rewards_get_the_column_as_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def judge(solution: list[Any], prompt_texts: list[str], **_: Any) -> list[float]:
        assert all(text.endswith("<think>") for text in prompt_texts)
        seen.extend(solution)
        return [float(i) for i in range(len(solution))]

    build(tiny_model_dir, tmp_path, judge, ROWS).train()
    assert metrics(tmp_path)["skipped_rows"] == 0.0
    assert all(row["solution"] in seen for row in ROWS)


@pytest.mark.parametrize("shared", [True, False])
def test_scoring_on_the_rows_trained_on_is_noticed(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: bool
) -> None:
    build(tiny_model_dir, tmp_path, "accuracy", ROWS, eval_dataset=ROWS if shared else ROWS[2:])
    lines = [record.getMessage() for record in caplog.records if "come from the same file" in record.getMessage()]
    assert len(lines) == shared


@pytest.mark.skipif(sys.platform != "linux", reason="another kernel does not tell a process that its parent is gone")
def test_a_killed_run_leaves_no_worker(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def stuck(rows: Any) -> None:
        os.write(writing, str(os.getpid()).encode())
        signal.pause()

    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, num_generations=2, max_steps=1,
        dataloader_num_workers=1,
    )  # fmt: skip
    rows = as_rows(ROWS)
    run = os.fork()
    if run == 0:
        try:
            next(iter(build_loader(rows, stuck, config, 0, 1)))  # type: ignore[arg-type]
        finally:
            os._exit(1)
    os.close(writing)
    worker = int(os.read(reading, 99))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    ended, _, _ = select.select([reading], [], [], 30)  # once the worker no longer holds the other end
    if not ended:
        os.kill(worker, signal.SIGKILL)
    assert ended, "the worker still runs"
