"""A long run of short steps: memory, descriptors, threads and temporary files stay what they are after the first."""

import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from campaign import RESULTS, report
from campaign_rewards import varied
from transformers import TrainerCallback

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.trainer import GRPOTrainer

STEPS, WARM, EVERY = (2000, 100, 100) if RESULTS else (60, 20, 20)
MORE_RSS = 1.02
"""transformers keeps the log's lines."""


class Sampled(TrainerCallback):
    """What the process holds, at some steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[int, dict[str, int]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY and state.global_step != WARM:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rows[state.global_step] = {
            "rss_kib": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "kernel_threads": len(os.listdir("/proc/self/task")),
            "temporary_files": len(list(self.folder.rglob("*"))),
        }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nothing_grows(
    tiny_model_dir: Path,
    sat_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], max_steps=STEPS, num_generations=2,
        per_device_train_batch_size=2, max_completion_length=2, learning_rate=1e-4, logging_steps=10, disable_tqdm=True,
        save_steps=EVERY, save_total_limit=2, beta=0.04,
    )  # fmt: skip
    trainer = GRPOTrainer(str(tiny_model_dir), varied, config, load_rows(str(sat_file), max_samples=16))
    sampled = Sampled(folder)
    trainer.add_callback(sampled)
    trainer.train()
    first, last = sampled.rows[WARM], sampled.rows[STEPS]
    growth = last["rss_kib"] / first["rss_kib"]
    report(capsys, "soak", {str(step): row for step, row in sampled.rows.items()}, steps=STEPS, rss_growth=growth)
    assert growth < MORE_RSS, sampled.rows
    for name in ("descriptors", "threads", "kernel_threads", "temporary_files"):
        assert last[name] <= first[name], (name, sampled.rows)
