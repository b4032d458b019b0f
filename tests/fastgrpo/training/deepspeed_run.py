"""Trains under DeepSpeed on two ranks, many runs in one process; run by test_deepspeed.py.

Usage: torchrun … deepspeed_run.py MODEL_DIR SAT_FILE OUTPUT_DIR RUN…
Every run leaves its folder in OUTPUT_DIR; the rows of `scripted-…` are those of data_parallel_run.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from data_parallel_run import ScriptedEngine, rows, some_reward
from peft import LoraConfig
from transformers.utils import logging

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import SamplingParams

CONFIGS = Path(__file__).parents[3] / "configs"
STEPS, SAVED = 4, 2
WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}
ADAPTERS = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["merger"])
PROMPT_ROW, GREEDY_TOKENS = 3, 8


def shipped(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed config, but for torch's own Adam in the place of DeepSpeed's, which is compiled first."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    if name.startswith("zero3"):  # otherwise no parameter of so small a model is partitioned
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def config(out: Path, zero: str, **settings: Any) -> GRPOConfig:
    shared = {
        "output_dir": str(out), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "deepspeed": None if zero == "ddp" else shipped(zero), "beta": 0.04,
    }  # fmt: skip
    return GRPOConfig(**shared | settings)


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def scripted(model: str, out: Path, zero: str, engine: str, ranks: int = 2, adapters: LoraConfig | None = None) -> None:
    """Three SGD steps on uneven rows: kinds differ between ranks, and one rank has none but corrupt ones."""
    settings = config(
        out, zero, engine=engine, loss_type="grpo", max_steps=3, num_generations=2,
        per_device_train_batch_size=4 // ranks, gradient_accumulation_steps=2, shuffle_dataset=False,
        max_completion_length=6, optim="sgd", learning_rate=0.5,
    )  # fmt: skip
    trainer = GRPOTrainer(model, some_reward, settings, rows(), peft_config=adapters)
    trainer.engine = ScriptedEngine()
    trainer.train()
    trainer.save_model()


def adam(
    model: str, data: str, out: Path, zero: str, steps: int, resume: Path | None = None, deepspeed: Any = None
) -> GRPOTrainer:
    """A run with a real rollout, Adam, a warm-up, and a reference that is the policy of the step before."""
    settings = config(
        out, zero, max_steps=steps, save_strategy="steps", save_steps=SAVED, num_generations=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=6, learning_rate=0.01,
        lr_scheduler_type="constant_with_warmup", warmup_steps=6, logging_steps=1, sync_ref_model=True,
        ref_model_mixup_alpha=1.0, ref_model_sync_steps=1,
        **({} if deepspeed is None else {"deepspeed": deepspeed}),
    )  # fmt: skip
    trainer = GRPOTrainer(model, token_sum, settings, load_rows(data))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def idle(model: str, data: str, out: Path, zero: str) -> None:
    """Three steps, the second without any gradient: its rewards are equal."""

    def rewards(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        return [float(sum(ids) % 7) if trainer_state.global_step != 1 else 0.5 for ids in completion_ids]

    settings = config(
        out, zero, beta=0.0, max_steps=3, num_generations=4, per_device_train_batch_size=4, max_completion_length=6,
        optim="sgd",
    )  # fmt: skip
    GRPOTrainer(model, rewards, settings, load_rows(data)).train()


def greedy(trainer: GRPOTrainer, out: Path) -> None:
    """Writes what the sampler says, synced from partitioned weights, of a prompt with a picture."""
    trainer.engine.sync()
    prompt = trainer.data_collator([trainer.train_dataset[PROMPT_ROW]]).prompts[0]
    params = SamplingParams(GREEDY_TOKENS, temperature=0.0)
    ((_, (completion,)),) = trainer.engine.generate([prompt], 1, params, step=0)
    if trainer.is_world_process_zero():
        (out / "greedy.json").write_text(json.dumps(completion.token_ids.tolist()))


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_warning()
    model, data, folder, *names = sys.argv[1:]
    for name in names:
        out = Path(folder) / name
        kind, zero, *more = name.split("-")
        if kind == "scripted":
            scripted(model, out, zero, *more)
        elif kind == "lora":
            scripted(model, out, zero, "fast", adapters=ADAPTERS)
        elif kind == "whole":
            greedy(adam(model, data, out, zero, STEPS), out)
        elif kind == "idle":
            idle(model, data, out, zero)
        elif kind == "short":
            adam(model, data, out, zero, 1)
        elif kind == "native":
            adam(model, data, out, zero, 1, deepspeed=str(CONFIGS / f"{zero}.json"))
        else:  # resumed-ZERO-ORIGIN; or scheduled-ZERO-ORIGIN, by DeepSpeed's own schedule
            checkpoint = Path(folder) / f"whole-{more[0]}" / f"checkpoint-{SAVED}"
            settings = shipped(zero) | {"scheduler": WARMUP} if kind == "scheduled" else None
            adam(model, data, out, zero, STEPS, resume=checkpoint, deepspeed=settings)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
