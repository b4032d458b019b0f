"""`fastgrpo train` on two ranks: ZeRO-3 with scores and checkpoints, and accelerate's launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from fastgrpo.config import GRPOConfig
from fastgrpo.resolve import resolve_model

CONFIGS = Path(__file__).parents[2] / "configs"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STEPS = 2
UNEVEN = "def reward(completion_ids, **_):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"


def shipped(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed config, with torch's own Adam: DeepSpeed's needs a compiler."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return settings | {"torch_adam": True, "zero_allow_untested_optimizer": True}


def train(launcher: tuple[str, ...], model: Path, data: Path, out: Path, *flags: str) -> list[dict[str, float]]:
    """The metrics of a run of two steps."""
    command = [*launcher, "-m", "fastgrpo", "train", "--model_name_or_path", str(model), "--dataset_name", str(data)]
    command += ["--output_dir", str(out), "--max_completion_length", "4", "--max_steps", str(STEPS), "--use_cpu"]
    command += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--learning_rate", "0.01"]
    command += ["--report_to", "none", "--reward_funcs", "uneven:reward", *flags]
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "uneven.py").write_text(UNEVEN)
    paths = [str(out.parent), *(os.path.abspath(entry) for entry in sys.path if entry)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    # gloo now and then aborts at tear-down, when all is written.
    assert (out / "summary.json").exists(), result.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_a_shipped_config_leaves_nothing_on_auto(name: str, tmp_path: Path) -> None:
    config = HfTrainerDeepSpeedConfig(shipped(name))
    assert config.config["zero_optimization"]["stage"] == int(name[4])
    config.trainer_config_process(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    left = [key for key, value in config.config.items() if value == "auto"]
    assert not left


@pytest.mark.slow
def test_zero_3_scores_trains_and_saves_what_zero_2_continues(
    tiny_model_dir: Path, sat_file: Path, cvbench_file: Path, tmp_path: Path
) -> None:
    for name in ("zero2", "zero3"):
        (tmp_path / f"{name}.json").write_text(json.dumps(shipped(name)))
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    scoring = ("--eval_dataset_name", str(cvbench_file), "--eval_max_samples", "4", "--eval_max_new_tokens", "3")
    out = tmp_path / "zero3"
    flags = ("--beta", "0.04", "--save_steps", "1", *scoring)
    lines = train(launcher, tiny_model_dir, sat_file, out, "--deepspeed", str(tmp_path / "zero3.json"), *flags)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 1e-3 for line in lines)
    assert {path.name for path in (out / "evals").glob("*.json")} == {"before.json", "after.json"}
    for folder in (out, out / "checkpoint-2"):
        _, loading = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["mismatched_keys"]
    zero2 = ("--deepspeed", str(tmp_path / "zero2.json"), "--beta", "0.04")
    assert len(train(launcher, out, sat_file, tmp_path / "zero2", *zero2)) == STEPS


@pytest.mark.slow
def test_accelerate_launch_trains_on_two_ranks(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    launcher += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    lines = train(launcher, tiny_model_dir, sat_file, tmp_path / "out", "--save_strategy", "no")
    assert [line["step"] for line in lines] == [1, 2]


def test_a_reference_of_a_partitioned_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0  # as DeepSpeed marks what it partitions
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.04)
    with pytest.raises(ValueError, match=r"beta=0.04 needs a frozen copy"):
        resolve_model(model, config, None)
