"""`fastgrpo train` in this process, with what can go wrong with it; a run's adapters."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.cli.main import main

Train = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="session")
def adapter_dir(tiny_model_dir: Path, sat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with --use_peft on the tiny model; its adapters changed until they change what it says."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    flags = {
        "model_name_or_path": tiny_model_dir, "dataset_name": sat_file, "output_dir": out, "use_peft": "true",
        "lora_r": 4, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 3,
        "max_steps": 1, "report_to": "none", "use_cpu": "true", "prompt_template": "answer",
    }  # fmt: skip
    assert main(["train", *(str(token) for name, value in flags.items() for token in (f"--{name}", value))]) == 0
    base = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, out)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * (1 + parameter.data.abs().cumsum(0).cos())
    model.save_pretrained(out)
    return out


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
        "def right(completions, **_): return [1.0] * len(completions)\n"
    )
    (tmp_path / "broken_rewards.py").write_text("def right(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "odd_rewards"
