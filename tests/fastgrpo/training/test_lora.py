"""LoRA from the first step to the merged model: only adapters train, are saved, come back, and are what is sampled."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.assembly import lora_config
from fastgrpo.cli.main import main
from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.model.load import load_policy
from fastgrpo.plain.engine import vision_inputs
from fastgrpo.training.setup import resolve_model
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import Prompt, SamplingParams

STEPS = 4
ADAPTERS = {
    "r": 4, "lora_alpha": 16, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs from completion to completion, whatever the model says."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def build(model: Path, rows: Path, out: Path, max_steps: int = STEPS, engine: str = "fast") -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, report_to=[], save_steps=2, max_steps=max_steps, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=6, learning_rate=0.1, logging_steps=1, disable_tqdm=True,
        beta=0.04, lr_scheduler_type="constant", engine=engine,
    )  # fmt: skip
    return GRPOTrainer(str(model), token_sum, config, load_rows(str(rows)), peft_config=LoraConfig(**ADAPTERS))


def test_adapters_start_from_the_runs_seed(tiny_model_dir: Path, tmp_path: Path) -> None:
    def first_values(seed: int) -> list[Tensor]:
        config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], seed=seed)
        model = resolve_model(load_policy(str(tiny_model_dir)), config, LoraConfig(**ADAPTERS))
        return [value for name, value in parameters(model).items() if "lora_A" in name]

    one, again, other = first_values(1), first_values(1), first_values(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("step_time", "tokens_per_second", "mfu")
    return [
        {k: v for k, v in line.items() if k not in clocks and not k.startswith(("time/", "share/"))} for line in lines
    ]


@pytest.fixture(scope="module")
def start_and_trained(
    tiny_model_dir: Path, sat_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], GRPOTrainer]:
    trainer = build(tiny_model_dir, sat_file, tmp_path_factory.mktemp("lora"))
    start = parameters(trainer.model)
    trainer.train()
    return start, trainer


@pytest.fixture
def trained(start_and_trained: tuple[dict[str, Tensor], GRPOTrainer]) -> GRPOTrainer:
    return start_and_trained[1]


def prompt_of(trainer: GRPOTrainer) -> Prompt:
    return trainer.data_collator([trainer.train_dataset[0]]).prompts[0]


@torch.no_grad()
def logits(model: Any, prompt: Prompt) -> Tensor:
    """[P, V] of a prompt with its picture."""
    ids = prompt.input_ids[None]
    found: Tensor = model.eval()(input_ids=ids, **vision_inputs(model, [prompt], ids), use_cache=False).logits[0]
    return found


def test_adapters_alone_move(start_and_trained: tuple[dict[str, Tensor], GRPOTrainer]) -> None:
    start, trainer = start_and_trained
    moved = {name for name, value in parameters(trainer.model).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    assert len(moved) == 2 * 7 * 2, "A and B, seven layers, two blocks"


def test_the_reference_is_the_model_without_adapters(trained: GRPOTrainer) -> None:
    assert trained.updater.reference_model is None
    steps = metrics_of(Path(trained.args.output_dir))
    assert steps[0]["kl"] < 1e-9
    assert all(step["kl"] > 1e-6 for step in steps[1:])


def test_the_plain_engine_takes_the_same_steps(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model_dir, sat_file, tmp_path, max_steps=2, engine="plain")
    trainer.train()
    steps = metrics_of(tmp_path)
    assert steps[0]["kl"] < 1e-9 < steps[1]["kl"]


def test_the_sampler_draws_from_the_merged_model(trained: GRPOTrainer) -> None:
    prompt = prompt_of(trained)
    trained.engine.sync()
    (_, (completion,)) = next(iter(trained.engine.generate([prompt], 1, SamplingParams(12, temperature=0.0), step=0)))
    merged = copy.deepcopy(trained.model).merge_and_unload().eval()
    ids = prompt.input_ids[None]
    found = merged.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **vision_inputs(merged, [prompt], ids),
        do_sample=False,
        max_new_tokens=12,
        suppress_tokens=[merged.config.image_token_id, merged.config.video_token_id],
    )
    assert completion.token_ids.tolist() == found[0, ids.shape[1] :].tolist()
    base = trained.model.get_base_model()
    with trained.model.disable_adapter():
        plain = logits(base, prompt)
    assert (logits(trained.model, prompt) - plain).abs().max() > 0.1, "the adapters change what is said"


def test_a_checkpoint_holds_the_adapters_alone(trained: GRPOTrainer, tiny_model_dir: Path, tmp_path: Path) -> None:
    trained.save_model(str(tmp_path / "saved"))
    for folder in (Path(trained.args.output_dir) / f"checkpoint-{STEPS}", tmp_path / "saved"):
        assert (folder / "adapter_config.json").is_file()
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        loaded = PeftModel.from_pretrained(load_policy(str(tiny_model_dir)), folder)
        expected = parameters(trained.model)
        assert all(torch.equal(value, expected[name]) for name, value in parameters(loaded).items())
        prompt = prompt_of(trained)
        assert torch.equal(logits(loaded, prompt), logits(trained.model, prompt))


def test_the_merged_model_loads_without_peft(trained: GRPOTrainer, tmp_path: Path) -> None:
    copy.deepcopy(trained.model).merge_and_unload().save_pretrained(tmp_path)
    loaded, report = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    prompt = prompt_of(trained)
    torch.testing.assert_close(logits(loaded, prompt), logits(trained.model, prompt), atol=1e-4, rtol=1e-4)


def test_a_resumed_run_is_the_same_run(
    trained: GRPOTrainer, tiny_model_dir: Path, sat_file: Path, tmp_path: Path
) -> None:
    build(tiny_model_dir, sat_file, tmp_path, max_steps=2).train()
    resumed = build(tiny_model_dir, sat_file, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert metrics_of(tmp_path) == metrics_of(Path(trained.args.output_dir))
    expected = parameters(trained.model)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(resumed.model).items())


def test_flags(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    needed = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file)]
    needed += ["--output_dir", str(tmp_path), "--use_cpu"]
    assert lora_config(parse(needed)[1]) is None
    given = ["--use_peft", "--lora_r", "3", "--lora_alpha", "5", "--lora_target_modules", "q_proj", "down_proj"]
    config = lora_config(parse([*needed, *given])[1])
    assert config is not None
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, {"q_proj", "down_proj"})
    with pytest.raises(ValueError, match="leave freeze_vision and freeze_llm off"):
        parse([*needed, "--use_peft", "--freeze_vision"])
    short = ["--max_steps", "1", "--max_completion_length", "4", "--report_to", "none", "--beta", "0.04"]
    assert main(["train", *needed, *given, *short]) == 0
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
