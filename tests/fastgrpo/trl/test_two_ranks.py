"""Two processes train and evaluate as one does: on a stream, by a reward model, with overridden rewards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("datasets")

CLOCKS = ("runtime", "per_second")


@pytest.fixture(scope="module")
def runs(text_model: Path, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one rank left, and what two did."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("two_ranks_run.py"))
    launchers = [
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ]
    started = [
        subprocess.Popen(
            [*launcher, script, str(text_model), str(reward_model), str(folder / str(i))],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, launcher in enumerate(launchers)
    ]
    for process in started:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]
    return [folder / str(i) for i in range(len(launchers))]


def evaluated(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "evaluated.json").read_text())
    return {name: value for name, value in metrics.items() if not name.endswith(CLOCKS)}


def test_they_train_the_same_weights(runs: list[Path]) -> None:
    one, two = (load_file(run / "model.safetensors") for run in runs)
    assert all(value.sub(two[name]).abs().max() < 1e-5 for name, value in one.items())


def test_they_measure_the_same_figures(runs: list[Path]) -> None:
    one, two = map(evaluated, runs)
    assert {"eval_few_loss", "eval_few_kl", "eval_many_entropy", "eval_many_rewards/tiny-judge/mean"} <= set(one)
    assert two == {name: pytest.approx(value, abs=1e-5) for name, value in one.items()}


def test_they_log_the_same_rewards(runs: list[Path]) -> None:
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for one, two in zip(*logs, strict=True):
        for name in ("reward", "reward_std", "rewards/tiny-judge/mean", "num_tokens", "loss"):
            assert one[name] == pytest.approx(two[name], abs=1e-5), name
