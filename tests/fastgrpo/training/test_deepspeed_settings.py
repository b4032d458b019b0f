"""DeepSpeed's batch sizes and precision, from `--deepspeed` or from the environment of `accelerate launch`."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.training import deepspeed_settings
from fastgrpo.training.deepspeed_settings import WHOLE_WEIGHTS, forget_shared_buffers, take_whole_steps

ACCUMULATED, MICRO_BATCH = 4, 8


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --config_file` of a DEEPSPEED file leaves in the environment."""
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def settings_of(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """DeepSpeed's settings as its engine will get them: 4 micro-batches of 8 completions, 2 a group."""
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", num_generations=2,
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=ACCUMULATED, **settings,
    )  # fmt: skip
    take_whole_steps(config)
    found: dict[str, Any] = config.deepspeed_plugin.deepspeed_config
    return found


SIZES = {"train_batch_size": MICRO_BATCH, "train_micro_batch_size_per_gpu": MICRO_BATCH}


@pytest.mark.usefixtures("launched")
def test_settings_from_the_environment_are_filled_in(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, max_grad_norm=0.5)
    expected = {**SIZES, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.usefixtures("launched")
def test_accumulation_of_the_launcher_may_be_said_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(ACCUMULATED))
    settings = settings_of(tmp_path)
    assert {**SIZES, "gradient_accumulation_steps": 1}.items() <= settings.items()


def test_settings_of_a_flag_are_the_same(tmp_path: Path) -> None:
    auto = dict.fromkeys((*SIZES, "gradient_accumulation_steps"), "auto")
    settings = settings_of(tmp_path, deepspeed={"zero_optimization": {"stage": 2}, **auto})
    assert {**SIZES, "gradient_accumulation_steps": 1}.items() <= settings.items()


@pytest.mark.parametrize(("stage", "left"), [(2, []), (3, ["stage3_prefetch_bucket_size"])])
def test_sizes_of_stage_3_are_left_on_auto_there_alone(tmp_path: Path, stage: int, left: list[str]) -> None:
    whole = {WHOLE_WEIGHTS: True} if stage == 3 else {}
    zero = {"stage": stage, "stage3_prefetch_bucket_size": "auto", **whole}
    settings = settings_of(tmp_path, deepspeed={"zero_optimization": zero})
    assert [name for name in settings["zero_optimization"] if name.startswith("stage3_")] == [*left, *whole]


@pytest.mark.parametrize("given", [{}, {WHOLE_WEIGHTS: "auto"}, {WHOLE_WEIGHTS: False}])
def test_weights_are_saved_whole_under_stage_3(
    tmp_path: Path, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path, deepspeed={"zero_optimization": {"stage": 3, **given}})
    assert settings["zero_optimization"][WHOLE_WEIGHTS] is True
    assert f"{WHOLE_WEIGHTS} was off: it is on" in caplog.text


@pytest.mark.parametrize(
    ("asked", "bf16", "fp16"), [("no", False, False), ("bf16", True, False), ("fp16", False, True)]
)
def test_precision_follows_the_launcher_where_no_flag_sets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, bf16: bool, fp16: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert (config.bf16, config.fp16) == (bf16, fp16)


@pytest.mark.usefixtures("launched")
def test_deepspeed_and_we_agree_on_the_launchers_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settings_of(tmp_path)["bf16"]["enabled"] is True


def test_a_ranks_own_shared_buffer_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_settings, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29501")
    places = ["29501_0", "29501_1", "29502_0"]
    names = [f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{place}" for place in places]
    for name in names:
        (tmp_path / name).touch()
    ranks: Any = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=object()),
        device=torch.device("cpu"),
        process_index=0,
        wait_for_everyone=lambda: None,
    )
    for _ in range(2):
        forget_shared_buffers(ranks)
        assert sorted(file.name for file in tmp_path.iterdir()) == names[1:]
