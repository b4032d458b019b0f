"""`fastgrpo train` on two ranks, by every launcher: on one node, and on two that meet on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from fastgrpo.cli.main import main
from fastgrpo.config import GRPOConfig
from fastgrpo.training.setup import resolve_model

CONFIGS = Path(__file__).parents[3] / "configs"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2")
ONE_NODE = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "fastgrpo")
STEPS, COMPLETIONS = 2, 4
UNEVEN = "def reward(completion_ids, **_):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"

ACCELERATE_FILE = """compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_multinode_launcher: standard
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: {is_3}
  zero3_save_16bit_model: {is_3}
  zero_stage: {stage}
distributed_type: DEEPSPEED
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""


def shipped(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed config, with torch's own Adam: DeepSpeed's needs a compiler."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return settings | {"torch_adam": True, "zero_allow_untested_optimizer": True}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def train(nodes: Sequence[Sequence[str]], model: Path, data: Path, out: Path, *flags: str) -> list[dict[str, float]]:
    """The metrics of two steps of a run that two ranks take together, a launcher's command for each node."""
    settings = ["train", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out)]
    settings += ["--max_completion_length", "4", "--max_steps", str(STEPS), "--use_cpu", "--learning_rate", "0.01"]
    settings += ["--per_device_train_batch_size", str(COMPLETIONS), "--num_generations", str(COMPLETIONS)]
    settings += ["--report_to", "none", "--reward_funcs", "uneven:reward", *flags]
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "uneven.py").write_text(UNEVEN)
    paths = [str(out.parent), *(os.path.abspath(entry) for entry in sys.path if entry)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    logs = [out.with_name(f"node{i}.txt") for i in range(len(nodes))]
    running = []
    for launcher, log in zip(nodes, logs, strict=True):
        with log.open("w") as file:
            command = [*launcher, *settings]
            running.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in running:
            process.wait(timeout=300)
    finally:
        for process in running:
            process.kill()
    # gloo now and then aborts at tear-down, when all is written.
    assert (out / "summary.json").exists(), "\n".join(log.read_text()[-3000:] for log in logs)
    for step in range(1, STEPS + 1):
        rows = pq.read_metadata(out / "completions" / f"completions_{step:05d}.parquet").num_rows
        assert rows == 2 * COMPLETIONS, "both ranks' are in the log"
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
    scoring = ("--eval_dataset_name", str(cvbench_file), "--eval_max_samples", "4", "--eval_max_new_tokens", "3")
    out = tmp_path / "zero3"
    flags = ("--beta", "0.04", "--save_steps", "1", *scoring)
    lines = train([ONE_NODE], tiny_model_dir, sat_file, out, "--deepspeed", str(tmp_path / "zero3.json"), *flags)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 1e-3 for line in lines)
    assert {path.name for path in (out / "evals").glob("*.json")} == {"before.json", "after.json"}
    for folder in (out, out / "checkpoint-2"):
        _, loading = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["mismatched_keys"]
    zero2 = ("--deepspeed", str(tmp_path / "zero2.json"), "--beta", "0.04")
    assert len(train([ONE_NODE], out, sat_file, tmp_path / "zero2", *zero2)) == STEPS


def test_two_nodes_train_together_and_share_the_scoring(
    tiny_model_dir: Path, sat_file: Path, cvbench_file: Path, tmp_path: Path
) -> None:
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test")
    nodes = [
        (*TORCHRUN, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", *meet, "-m", "fastgrpo")
        for rank in range(2)
    ]
    scoring = ("--eval_dataset_name", str(cvbench_file), "--eval_max_samples", "5", "--eval_max_new_tokens", "3")
    lines = train(nodes, tiny_model_dir, sat_file, tmp_path / "out", "--save_strategy", "no", *scoring)
    assert [line["step"] for line in lines] == [1, 2]
    alone = ["--max_samples", "5", "--max_new_tokens", "3", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(["eval", str(tiny_model_dir), str(cvbench_file), *alone]) == 0
    of_two = pq.read_table(tmp_path / "out" / "evals" / "before.parquet").to_pylist()
    assert of_two == pq.read_table(tmp_path / "evals" / "eval.parquet").to_pylist()
    assert pq.read_metadata(tmp_path / "out" / "evals" / "after.parquet").num_rows == 5


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_accelerate_launch(tiny_model_dir: Path, sat_file: Path, tmp_path: Path, nodes: int) -> None:
    # With --cpu accelerate starts two ranks through MPI alone.
    shared = ("--multi_gpu", "--num_machines", str(nodes), "--num_processes", "2")
    meet = ("--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    launchers = [(*ACCELERATE, *shared, *meet, "--machine_rank", str(rank), "-m", "fastgrpo") for rank in range(nodes)]
    lines = train(launchers, tiny_model_dir, sat_file, tmp_path / "out", "--save_strategy", "no")
    assert [line["step"] for line in lines] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launch_with_a_deepspeed_file(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path, stage: int
) -> None:
    """A file such as `accelerate config` writes and TRL ships, two micro-batches a step."""
    file = tmp_path / f"zero{stage}.yaml"
    file.write_text(ACCELERATE_FILE.format(stage=stage, is_3=str(stage == 3).lower()))
    launcher = (*ACCELERATE[:3], "--config_file", str(file), "--main_process_port", free_port(), "-m", "fastgrpo")
    accumulation = ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", str(COMPLETIONS // 2))
    out = tmp_path / "out"
    lines = train([launcher], tiny_model_dir, sat_file, out, *accumulation, "--beta", "0.04")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 1e-3 for line in lines)
    _, loading = Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("program", [("--module", "fastgrpo"), ("--no_local_rank", "--module", "fastgrpo")])
def test_the_deepspeed_launcher(tiny_model_dir: Path, sat_file: Path, tmp_path: Path, program: tuple[str, ...]) -> None:
    zero2 = ("--deepspeed", str(CONFIGS / "zero2.json"), "--save_strategy", "no")
    launcher = (*DEEPSPEED, "--master_port", free_port(), *program)
    lines = train([launcher], tiny_model_dir, sat_file, tmp_path / "out", *zero2)
    assert [line["step"] for line in lines] == [1, 2]


def test_a_reference_of_a_partitioned_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0  # as DeepSpeed marks what it partitions
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.04)
    with pytest.raises(ValueError, match=r"beta=0.04 needs a frozen copy"):
        resolve_model(model, config, None)


@pytest.mark.slow
def test_sigterm_to_the_command_that_started_the_ranks(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file), "--output_dir", str(out)]
    flags += ["--use_cpu", "--max_steps", "500", "--max_completion_length", "4", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--num_processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (tmp_path / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "fastgrpo", "train", *flags]
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    while not (out / "metrics.jsonl").exists() and running.poll() is None:
        time.sleep(0.05)
    running.terminate()
    assert running.wait(240) == 143, (tmp_path / "log.txt").read_text()
    (checkpoint,) = out.glob("checkpoint-*")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert checkpoint.name == f"checkpoint-{steps[-1]}"
    assert (checkpoint / "manifest.json").is_file()
