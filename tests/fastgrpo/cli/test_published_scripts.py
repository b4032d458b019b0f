"""VisualThinker-R1-Zero's three scripts with program, model and data replaced, on the data that it prepares."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from run_files import completions_of, metrics_of

from fastgrpo.cli.main import main
from fastgrpo.data.loading import load_rows

GRPO_SAT = """--max_prompt_length 1024 --max_completion_length 6 --per_device_train_batch_size 1
    --gradient_accumulation_steps 2 --logging_steps 1 --bf16 --gradient_checkpointing 1
    --attn_implementation flash_attention_2 --max_pixels 401408 --num_train_epochs 2 --run_name Qwen2-VL-2B-GRPO-SAT
    --save_steps 100 --save_only_model true --report_to wandb"""
"""run_grpo_SAT.sh; its completions have 700 tokens."""
GRPO = """--max_prompt_length 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --logging_steps 1
    --bf16 --report_to wandb --gradient_checkpointing false --attn_implementation flash_attention_2 --max_pixels 401408
    --num_train_epochs 2 --run_name Qwen2-VL-2B-GRPO-CLEVR-70k --save_steps 100 --save_only_model true"""
"""run_grpo.sh."""
SFT_SAT = """--learning_rate 2.0e-5 --num_train_epochs 2 --packing True --max_seq_length 1024
    --per_device_train_batch_size 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2
    --gradient_checkpointing True --report_to wandb --bf16 True --logging_steps 5 --eval_strategy no
    --run_name Qwen2_VL-2B-SFT-SAT"""
"""run_sft_SAT.sh."""
ROWS = 8
ACCELERATE_FILE = """compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
{deepspeed}
distributed_type: DEEPSPEED
downcast_bf16: 'no'
machine_rank: 0
main_training_function: main
{precision}
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
IN_THE_FILE = """  deepspeed_multinode_launcher: standard
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: {is_3}
  zero3_save_16bit_model: {is_3}
  zero_stage: {stage}"""
IN_A_FILE_OF_ITS_OWN = """  deepspeed_config_file: {file}
  zero3_init_flag: {is_3}"""


@pytest.fixture
def prepared(sat_file: Path, tmp_path: Path) -> Path:
    """SAT_train_15000.json as its preparation writes it: messages, and the paths of pictures beside it."""
    folder = tmp_path / "SAT"
    (folder / "SAT_images_train").mkdir(parents=True)
    records = []
    for i, row in enumerate(pq.read_table(sat_file).slice(0, ROWS).to_pylist()):
        name = f"SAT_images_train/{i}_0.png"
        Image.open(io.BytesIO(row["image_bytes"][0])).save(folder / name)
        *some, last = row["answers"]
        asked = f"{row['question']} Choose between the following options: {', '.join(some)} or {last}"
        messages = [
            {"role": "user", "content": f"<image> Answer in natural language. {asked}"},
            {"role": "assistant", "content": row["correct_answer"]},
        ]
        records.append({"messages": messages, "images": [name]})
    (folder / "SAT_train_15000.json").write_text(json.dumps(records, indent=4))
    return folder / "SAT_train_15000.json"


def run(program: list[str], command: str, model: Path, data: Path, out: Path, flags: str) -> str:
    """What the program prints on standard error."""
    named = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out)]
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    done = subprocess.run(
        [*program, command, *named, *flags.split()],
        env=environment, cwd=out.parent, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    # gloo now and then aborts at tear-down, when all is written.
    assert (out / "summary.json").exists(), done.stderr[-3000:]
    return done.stderr


def test_prepared_rows_are_those_that_sat_itself_gives(prepared: Path, sat_file: Path) -> None:
    ours, theirs = load_rows(str(sat_file)), load_rows(str(prepared))
    assert len(theirs) == ROWS
    for i in range(ROWS):
        row, expected = theirs.convert(*theirs[i]), ours.convert(*ours[i])
        assert row.columns["solution"] == expected.columns["solution"]
        assert row.question is not None
        assert row.question.split(" Choose ")[0] == (expected.question or "").split(" Choose ")[0]
        assert [image.size for image in row.images] == [image.size for image in expected.images]


def test_run_sft_sat_as_written(
    tiny_model_dir: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stderr = run([sys.executable, "-m", "fastgrpo"], "sft", tiny_model_dir, prepared, out, SFT_SAT)
    mapped = [line for line in stderr.splitlines() if line.startswith("Flags taken over: ")]
    assert len(mapped) == 1
    assert "max_seq_length=1024 (max_length" in mapped[0]
    assert "packing=True (" in mapped[0]
    steps = metrics_of(out)
    assert [step["step"] for step in steps] == list(range(1, ROWS + 1)), "two rows a step, two epochs"
    assert steps[0]["learning_rate"] == pytest.approx(2e-5)
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["max_length"], settings["bf16"], settings["gradient_checkpointing"]) == (1024, True, True)
    assert main(["generate", str(out), "Where?", "--device", "cpu", "--max_new_tokens", "2"]) == 0
    assert "questions are asked in instruct mode, template direct" in capsys.readouterr().err, "as in training"


def test_without_whole_groups_a_batch_counts_prompts(
    tiny_model_dir: Path, prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = f"{GRPO} --max_completion_length 3 --max_steps 1 --num_generations 3".split()
    named = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(prepared)]
    out = tmp_path / "out"
    assert main(["train", *named, "--output_dir", str(out), *flags]) == 0
    told = [message for message in caplog.messages if "is taken for prompts" in message]
    assert len(told) == 1
    assert "2 completions a rank are no group of 3" in told[0]
    assert len([message for message in caplog.messages if "wandb" in message]) == 1
    rows = completions_of(out, 1)
    assert [row["index"] for row in rows] == [0, 1, 2] * 2
    assert all(row["solution"] for row in rows)
    assert "<image>" not in rows[0]["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize(
    ("command", "flags", "stage"),
    [("train", GRPO_SAT, 2), ("train", f"{GRPO} --max_completion_length 6", 3), ("sft", SFT_SAT, 3)],
    ids=["run_grpo_SAT", "run_grpo", "run_sft_SAT"],
)
def test_a_script_under_accelerate_and_deepspeed(
    tiny_model_dir: Path, prepared: Path, tmp_path: Path, command: str, flags: str, stage: int, own_file: bool
) -> None:
    """`accelerate launch --config_file`: DeepSpeed's settings in that file, or in one of their own that says auto."""
    is_3, deepspeed = str(stage == 3).lower(), tmp_path / "deepspeed.json"
    auto: dict[str, Any] = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **dict.fromkeys(sizes, "auto")}
    deepspeed.write_text(json.dumps(auto | {"bf16": {"enabled": "auto"}, "zero_optimization": zero}))
    settings = (IN_A_FILE_OF_ITS_OWN if own_file else IN_THE_FILE).format(file=deepspeed, is_3=is_3, stage=stage)
    file = tmp_path / "accelerate.yaml"
    precision = "main_process_port: 0" if own_file else "mixed_precision: bf16"  # told by DeepSpeed's own file
    file.write_text(ACCELERATE_FILE.format(deepspeed=settings, precision=precision))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "fastgrpo"]
    out = tmp_path / "out"
    run(launcher, command, tiny_model_dir, prepared, out, flags)
    # Four rows a step over two ranks, two epochs.
    assert [step["step"] for step in metrics_of(out)] == list(range(1, ROWS // 2 + 1))
    assert main(["generate", str(out), "Where?", "--device", "cpu", "--max_new_tokens", "2"]) == 0


@pytest.mark.slow
def test_num_processes_launches_by_itself(tiny_model_dir: Path, prepared: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text("num_processes: 2\nmax_steps: 1\n")
    program = [sys.executable, "-m", "fastgrpo"]
    stderr = run(program, "sft", tiny_model_dir, prepared, out, f"{SFT_SAT} --config {file}")
    assert "2 ranks" in stderr
    assert len(metrics_of(out)) == 1
