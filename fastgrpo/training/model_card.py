"""The model card (README.md) of every saved model: what it was made from, on which data, for which rewards, and how."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel

from fastgrpo.model.families import base_model, is_multimodal
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.training.run_log import RunLog

SETTINGS = (
    *("loss_type", "beta", "epsilon", "scale_rewards", "num_generations", "num_iterations", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "batch_unit", "gradient_accumulation_steps"),
    *("max_completion_length", "max_prompt_length", "temperature", "top_p", "top_k", "prompt_mode", "prompt_template"),
    *("max_length", "train_on_prompt"),
    *("bf16", "fp16", "freeze_vision", "freeze_llm", "lora_r", "lora_alpha", "seed"),
)
"""Those a card shows, where a run has them."""
FIGURES = ("loss", "reward", "completions/mean_length", "completions/clipped_ratio", "reflection_rate", "kl", "entropy")
"""Metrics that a card shows, beside the mean of every reward function."""


METHODS = {"grpo": "group-relative policy optimization (arXiv 2402.03300)", "sft": "supervised fine-tuning"}

LAST_STEPS = 10
"""Metrics are means of so many."""


@dataclass(frozen=True)
class RunFacts:
    """What a card says of a run that is not in the run's files."""

    model: Any
    config: RunConfig
    method: str
    """A key of `METHODS`."""
    reward_names: Sequence[str]
    step: int
    """Optimizer steps taken."""


def write_model_card(folder: Path, run: RunFacts, log: RunLog, scores: Mapping[str, float | None]) -> None:
    """Writes README.md; settings.json of the run, where it is there, says more than its config."""
    settings = log.folder / "settings.json"
    text = model_card(
        base=base_model(run.model).config._name_or_path,
        adapters=isinstance(run.model, PeftModel),
        multimodal=is_multimodal(run.model),
        step=run.step,
        method=run.method,
        reward_names=run.reward_names,
        settings=json.loads(settings.read_text()) if settings.exists() else run.config.to_dict(),
        metrics=log.last_metrics(LAST_STEPS),
        scores=scores,
    )
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


def model_card(
    *,
    base: str,
    adapters: bool,
    multimodal: bool,
    step: int,
    method: str,
    reward_names: Sequence[str],
    settings: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    scores: Mapping[str, float | None],
) -> str:
    """The text of a card.

    Args:
        base: hub id or folder of the model that was trained.
        adapters: the folder holds adapters alone.
        method: a key of `METHODS`.
        settings: of the run, by name.
        metrics: of the last steps, as metrics.jsonl has them: shown are their means.
        scores: figures on held-out rows by what they are, fractions or tokens.
    """
    data = str(settings.get("dataset_name") or "")
    header = ModelCardData(
        library_name="peft" if adapters else "transformers",
        base_model=base if _is_hub_id(base) else None,
        datasets=[data] if _is_hub_id(data) else None,
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=[method, "fastgrpo", *(["lora"] if adapters else [])],
    )
    made_of = [
        ("base model", base),
        ("training data", data or "not named"),
        ("reward functions", ", ".join(reward_names) or None),
        ("optimizer steps", step),
    ]
    shown = [*FIGURES, *(f"rewards/{name}/mean" for name in reward_names)]
    figures = [(name, _mean([line[name] for line in metrics if line.get(name) is not None])) for name in shown]
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {Path(base).name}, trained with {method.upper()}",
        f"{'Adapters of' if adapters else 'Weights of'} a model trained with fastgrpo, by {METHODS[method]}.",
        _table("made of", made_of),
        "## Settings",
        _table("setting", [(name, settings[name]) for name in SETTINGS if settings.get(name) is not None]),
        "## Figures",
        _table(f"mean of the last {len(metrics)} steps", figures),
        _table("on held-out rows", list(scores.items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    known = [(name, value) for name, value in rows if value is not None]
    lines = [f"| {title} | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in known)]
    return "\n".join(lines) if known else ""


def _text(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
