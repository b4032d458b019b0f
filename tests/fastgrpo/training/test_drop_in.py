"""Scripts written for TRL, run with their import line changed and nothing else."""

import inspect
import json
import runpy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo import GRPOConfig, GRPOTrainer
from fastgrpo.model.load import load_processing

Dataset = pytest.importorskip("datasets").Dataset

TRL_IMPORT = "from trl import GRPOConfig, GRPOTrainer"

SCRIPT = """
import re

from datasets import Dataset
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

SYSTEM_PROMPT = "First think, then answer between <answer> and </answer>."


def make_conversation(example):
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example["problem"]}]},
        ]
    }


def format_reward(completions, **kwargs):
    pattern = r"^<think>.*?</think>\\s*<answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content, re.DOTALL) else 0.0 for content in contents]


def accuracy_reward(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [None if answer == "" else float(answer in content) for content, answer in zip(contents, solution)]


async def length_reward(prompts, completions, completion_ids, trainer_state, log_metric, **kwargs):
    log_metric("seen", len(prompts))
    return [len(ids) / 10 + sum(ids) % 3 for ids in completion_ids]


dataset = Dataset.from_list(
    [
        {"image": Image.new("RGB", (70, 56), colour), "problem": f"Is it {colour}?", "solution": solution}
        for colour, solution in [("red", "yes"), ("blue", "no"), ("green", ""), ("white", "yes")]
    ]
)
dataset = dataset.map(make_conversation, remove_columns=["problem"])

training_args = GRPOConfig(
    output_dir=output_dir,
    learning_rate=1e-2,
    remove_unused_columns=False,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=8,
    use_vllm=True,
    vllm_mode="colocate",
    vllm_gpu_memory_utilization=0.5,
    beta=0.04,
    loss_type="grpo",
    scale_rewards="batch",
    reward_weights=[1.0, 2.0, 0.5],
    report_to="none",
    logging_steps=1,
    save_strategy="steps",
    save_steps=1,
    log_completions=False,
)
model = Qwen2VLForConditionalGeneration.from_pretrained(model_id)
trainer = GRPOTrainer(
    model=model,
    args=training_args,
    processing_class=processor,
    reward_funcs=[format_reward, accuracy_reward, length_reward],
    train_dataset=dataset,
)
trainer.train()
trainer.save_model(training_args.output_dir)
"""


class Processor:
    """What a joint processor is to a script: a tokenizer and an image processor, saved together."""

    def __init__(self, folder: Path) -> None:
        processing = load_processing(str(folder))
        self.tokenizer, self.image_processor = processing.tokenizer, processing.image_processor


def test_a_vision_script_for_trl(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert SCRIPT.count(TRL_IMPORT) == 1
    script = tmp_path / "train_grpo.py"
    script.write_text(SCRIPT.replace(TRL_IMPORT, TRL_IMPORT.replace("trl", "fastgrpo")))
    given = {
        "output_dir": str(tmp_path / "run"),
        "model_id": str(tiny_model_dir),
        "processor": Processor(tiny_model_dir),
    }
    variables = runpy.run_path(str(script), init_globals=given)

    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["seen"] == 8
        assert step["grad_norm"] > 0
        assert {"rewards/format_reward/mean", "rewards/accuracy_reward/mean", "rewards/length_reward/mean"} <= set(step)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "run" / "completions").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["seed"]) == (2, 42)
    assert summary["wall_s"] >= summary["train_s"] == pytest.approx(sum(step["step_time"] for step in steps))
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["model_name_or_path"], settings["gradient_accumulation_steps"]) == (str(tiny_model_dir), 2)
    assert settings["reward_funcs"] == ["format_reward", "accuracy_reward", "length_reward"]
    assert "length_reward" in (tmp_path / "run" / "report.html").read_text()
    trained = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in variables["model"].state_dict().items())
    assert load_processing(str(tmp_path / "run")).image_processor is not None


def test_positional_arguments_and_a_lone_reward(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    class Shortness:
        def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [-float(len(ids)) for ids in completion_ids]

    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, per_device_train_batch_size=8,
        max_completion_length=4, save_strategy="no",
    )  # fmt: skip
    rows = pq.read_table(sat_file).slice(0, 2).to_pylist()
    trainer = GRPOTrainer(str(tiny_model_dir), Shortness(), arguments, rows)
    trainer.train()
    assert "rewards/Shortness/mean" in json.loads((tmp_path / "metrics.jsonl").read_text())


def test_the_constructor_takes_trls_arguments_in_their_order() -> None:
    names = list(inspect.signature(GRPOTrainer).parameters)
    assert names[:6] == ["model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"]
    assert {"callbacks", "optimizers", "peft_config"} <= set(names)
