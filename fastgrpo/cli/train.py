"""A whole run: score the base, train, score again, sum up, draw the report."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel

from fastgrpo.atomic_files import write_aside
from fastgrpo.cli.arguments import ScriptArguments
from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.data.row_dataset import RowDataset, warn_of_shared_rows
from fastgrpo.evaluation import evaluate, write_evaluation
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.report import write_report
from fastgrpo.training.checkpoints import find_checkpoint
from fastgrpo.training.trainer import GRPOTrainer

console = Console(stderr=True)


def run_training(config: GRPOConfig, script: ScriptArguments) -> dict[str, Any]:
    """Trains as `fastgrpo train` does; returns what summary.json holds (on the main process).

    Raises:
        ValueError: a setting, a file or a data set that cannot work; the message says how to mend it.
    """
    start = time.perf_counter()
    output_dir = Path(config.output_dir)
    require_writable(output_dir)
    resuming = find_checkpoint(config.resume_from_checkpoint, output_dir) is not None
    rows = load_training_rows(script, config.seed)
    held_out = load_held_out(script, config.seed)
    trainer = GRPOTrainer(
        model=load_model(script, config),
        reward_funcs=script.reward_funcs,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out if config.eval_strategy != "no" else None,
        processing_class=load_processing(
            script.model_name_or_path, script.min_pixels, script.max_pixels, config.trust_remote_code
        ),
        peft_config=lora_config(script),
    )
    trainer.get_train_dataloader()  # a data set smaller than a rollout is told now, not after the first scoring
    is_main = trainer.is_world_process_zero()
    if held_out is not None and is_main and config.eval_strategy == "no":  # else the trainer has looked
        warn_of_shared_rows(rows, held_out)
    if trainer.run_log is not None and not resuming:
        trainer.run_log.start_over()
    if is_main:
        write_aside(output_dir / "settings.json", lambda path: path.write_text(_settings_json(config, script)))
    has_before = (output_dir / "evals" / "before.json").exists()
    if held_out is not None:
        trainer.engine.sync()  # all ranks: weights may lie in pieces on all of them
    if held_out is not None and is_main and not (resuming and has_before):
        _score(trainer, script, held_out, "before", pass_at_k=script.eval_pass_at_k, shuffles=0)
    trainer.accelerator.wait_for_everyone()
    trainer.train()
    trainer.save_model(config.output_dir)
    if held_out is not None:
        trainer.engine.sync()
    if not is_main:
        return {}
    if held_out is not None:
        _score(trainer, script, held_out, "after", pass_at_k=0, shuffles=script.eval_shuffles)
    summary = summarise(output_dir, seed=config.seed, wall_s=time.perf_counter() - start)
    write_aside(output_dir / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    report = write_report([output_dir])
    console.print(f"summary: {output_dir / 'summary.json'}\nreport:  {report}", highlight=False, soft_wrap=True)
    return summary


def lora_config(script: ScriptArguments) -> LoraConfig | None:
    """The adapters to train, if any."""
    if not script.use_peft:
        return None
    targets = script.lora_target_modules
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=script.lora_modules_to_save,
        use_rslora=script.use_rslora,
        task_type="CAUSAL_LM",
    )


def require_writable(folder: Path) -> None:
    """Raises ValueError unless files can be written into `folder`, which is created when missing."""
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error.strerror}. Choose another.") from error


def load_model(script: ScriptArguments, config: GRPOConfig) -> PreTrainedModel:
    """The policy that the flags name, with what they freeze frozen."""
    return load_policy(
        script.model_name_or_path,
        dtype=script.dtype,
        attn_implementation=script.attn_implementation,
        freeze_vision=script.freeze_vision,
        freeze_llm=script.freeze_llm,
        trust_remote_code=config.trust_remote_code,
        model_init_kwargs=config.model_kwargs,
    )


def load_training_rows(script: ScriptArguments, seed: int) -> RowDataset:
    """The rows that the flags name."""
    return load_rows(
        script.dataset_name,
        split=script.dataset_train_split,
        config_name=script.dataset_config,
        max_samples=script.max_samples,
        seed=seed,
        single_image_only=script.single_image_only,
    )


def load_held_out(script: ScriptArguments, seed: int) -> RowDataset | None:
    """The rows to score before and after training, if any are named."""
    if script.eval_dataset_name is None:
        return None
    return load_rows(script.eval_dataset_name, split=script.eval_split, max_samples=script.eval_max_samples, seed=seed)


def _score(
    trainer: GRPOTrainer, script: ScriptArguments, rows: RowDataset, name: str, *, pass_at_k: int, shuffles: int
) -> None:
    """Scores the model as it is and writes evals/{name}.json and .parquet."""
    evaluation = evaluate(
        trainer.engine,
        trainer.builder,
        rows,
        max_new_tokens=script.eval_max_new_tokens,
        batch_size=trainer.config.per_device_eval_batch_size,
        pass_at_k=pass_at_k,
        shuffles=shuffles,
        seed=trainer.config.seed,
        progress=progress_lines(f"scoring {name} training"),
    )
    write_evaluation(
        evaluation,
        Path(trainer.config.output_dir) / "evals",
        name,
        step=trainer.state.global_step,
        dataset=str(script.eval_dataset_name),
    )


def progress_lines(what: str, every_seconds: float = 5.0) -> Callable[[int, int], None]:
    """A progress callback that prints a line now and then, and one at the end."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > every_seconds:
            last = time.monotonic()
            console.print(f"{what}: {done}/{total} questions", highlight=False, soft_wrap=True)

    return progress


def summarise(output_dir: Path, *, seed: int, wall_s: float) -> dict[str, Any]:
    """A run's figures from its files; fractions for rates, None for what was not measured."""
    before, after = (_read_json(output_dir / "evals" / f"{name}.json") for name in ("before", "after"))
    steps = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = math.fsum(step["step_time"] for step in steps)
    drawn = math.fsum(step["tokens_per_second"] * step["step_time"] for step in steps)
    pass_at_k = before.get("pass_at_k")
    by_task_before, by_task_after = before.get("accuracy_by_task", {}), after.get("accuracy_by_task", {})
    return {
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "answered_accuracy_before": before.get("answered_accuracy"),
        "answered_accuracy_after": after.get("answered_accuracy"),
        "answered_rate_before": before.get("answered_rate"),
        "answered_rate_after": after.get("answered_rate"),
        "answered_accuracy_shuffled_images": after.get("answered_accuracy_shuffled_images"),
        "chance": after.get("chance"),
        **({f"pass_at_{pass_at_k['k']}_before": pass_at_k["value"]} if pass_at_k else {}),
        "accuracy_by_task": {
            task: {
                "before": by_task_before.get(task, {}).get("accuracy"),
                "after": score["accuracy"],
                "chance": score["chance"],
                "count": score["count"],
            }
            for task, score in by_task_after.items()
        },
        "mean_length_before": before.get("mean_length"),
        "mean_length_after": after.get("mean_length"),
        "reflection_rate_before": before.get("reflection_rate"),
        "reflection_rate_after": after.get("reflection_rate"),
        "steps": steps[-1]["step"] if steps else 0,
        "wall_s": wall_s,
        "train_s": seconds,
        "tokens_per_s": drawn / seconds if seconds else None,
        "seed": seed,
        "torch": torch.__version__,
    }


def _settings_json(config: GRPOConfig, script: ScriptArguments) -> str:
    return json.dumps({**config.to_dict(), **asdict(script)}, indent=2, default=str) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
