"""Settings of TRL that change what the trainer does around the objective."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl

from fastgrpo.config import GRPOConfig
from fastgrpo.training import completions_upload
from fastgrpo.training.completions_upload import CompletionsUpload
from fastgrpo.training.progress import ProgressDisplay
from fastgrpo.training.setup import sampling_params


def make(tmp_path: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_generation_kwargs_go_before_the_settings(tmp_path: Path) -> None:
    given = {"temperature": 0.5, "top_k": 7, "max_new_tokens": 3, "min_p": 0.1}
    params = sampling_params(make(tmp_path, temperature=0.9, top_p=0.8, generation_kwargs=given))
    assert (params.temperature, params.top_k, params.max_new_tokens, params.min_p) == (0.5, 7, 3, 0.1)
    assert params.top_p == 0.8
    beams = make(tmp_path, generation_kwargs={"do_sample": True, "num_beams": 2, "top_k": 7})
    assert sampling_params(beams).top_k == 7
    text = make(tmp_path, generation_kwargs='{"top_k": 7}')
    assert sampling_params(text).top_k == 7


def test_the_completions_log_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Scheduler:
        def __init__(self, **options: Any) -> None:
            calls.append(("schedule", options))

        def trigger(self) -> Any:
            calls.append(("trigger", {}))
            return SimpleNamespace(result=lambda: calls.append(("result", {})))

        def stop(self) -> None:
            calls.append(("stop", {}))

    monkeypatch.setattr(completions_upload, "CommitScheduler", Scheduler)
    monkeypatch.setattr(completions_upload, "create_repo", lambda repo, **options: calls.append((repo, options)))
    config = make(tmp_path, log_completions_hub_repo="me/logs", hub_private_repo=True)
    upload = CompletionsUpload(tmp_path / "completions", config)
    main, other = (cast(Any, SimpleNamespace(is_world_process_zero=zero)) for zero in (True, False))
    upload.on_train_begin(config, other, TrainerControl())
    upload.on_train_end(config, other, TrainerControl())
    assert calls == []
    upload.on_train_begin(config, main, TrainerControl())
    upload.on_train_end(config, main, TrainerControl())
    assert [name for name, _ in calls] == ["me/logs", "schedule", "trigger", "result", "stop"]
    assert calls[0][1]["private"] is True
    assert (calls[1][1]["repo_type"], calls[1][1]["folder_path"]) == ("dataset", tmp_path / "completions")


@pytest.mark.parametrize(("unique", "printed"), [(True, [1, 2]), (False, [1, 1, 2])])
def test_unique_prompts_are_printed_once(tmp_path: Path, unique: bool, printed: list[int]) -> None:
    console = Console(width=60, file=io.StringIO())
    display = ProgressDisplay(make(tmp_path, num_completions_to_print=3, log_unique_prompts=unique), console)
    records = [
        SimpleNamespace(row_id=row, reward=1.0, advantage=0.0, prompt="p", completion="c") for row in (1, 1, 2, 2)
    ]
    display.print_completions(cast(Any, records))
    assert [int(row) for row in re.findall(r"row (\d)", console.file.getvalue())] == printed  # type: ignore[attr-defined]


def test_the_device_cache_is_emptied_at_intervals(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.accelerator.memory, "empty_cache", lambda: emptied.append(1))
    build(max_steps=3, torch_empty_cache_steps=2).train()
    assert len(emptied) == 2  # at steps 0 and 2, as transformers counts


def test_the_adaptive_coefficient_outlives_a_checkpoint(build: Any, tmp_path: Path) -> None:
    settings = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 100.0}
    first = build(max_steps=2, save_strategy="steps", save_steps=1, **settings)
    first.train()
    assert first.entropy.coefficient == pytest.approx(0.11)
    resumed = build(max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.entropy.coefficient == pytest.approx(0.11)
    lines = [line for line in resumed.state.log_history if "entropy_coef" in line]
    assert [line["entropy_coef"] for line in lines] == pytest.approx([0.105, 0.11])
