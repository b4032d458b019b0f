"""The run card: what it takes to repeat a run, on its page."""

from dataclasses import MISSING, fields
from typing import Any

import yaml

from fastgrpo.config import GRPOConfig
from fastgrpo.report.formats import count, duration
from fastgrpo.report.headline import versions_of
from fastgrpo.report.run import Run, is_supervised
from fastgrpo.safe_text.redaction import is_secret
from fastgrpo.settings.sft_config import SFTConfig

_OF_THIS_MACHINE = frozenset(
    {"output_dir", "run_id", "logging_dir", "run_name", "resume_from_checkpoint", "local_rank"}
)


def run_card(run: Run) -> dict[str, Any]:
    """Facts by name, and the settings as a file for `--config`."""
    head, setting = run.headline, run.setting
    rewards = setting("reward_funcs") or []
    weights = setting("reward_weights") or [1.0] * len(rewards)
    steps = head.steps if head.steps is not None else setting("max_steps")
    facts = {
        "Model": setting("model_name_or_path"),
        "Data": _joined(setting("dataset_name"), ("first rows", setting("max_samples"))),
        "Held-out data": _joined(setting("eval_dataset_name"), ("first rows", setting("eval_max_samples"))),
        "Rewards": ", ".join(f"{float(w):g} × {name}" for name, w in zip(rewards, weights, strict=False)),
        "Batch": _joined(
            setting("per_device_train_batch_size"),
            ("unit", setting("batch_unit")),
            ("accumulated", setting("gradient_accumulation_steps")),
            ("completions a prompt", setting("num_generations")),
        ),
        "Schedule": _joined(
            setting("lr_scheduler_type"),
            ("learning rate", setting("learning_rate")),
            ("warm-up steps", setting("warmup_steps")),
            ("epochs", None if (setting("max_steps") or 0) > 0 else setting("num_train_epochs")),
        ),
        "Objective": _joined(
            setting("loss_type"), ("beta", setting("beta")), ("temperature", setting("temperature")),
            ("longest completion", setting("max_completion_length")),
        ),
        "Steps": count(steps) if steps else "",
        "Seed": str(head.seed if head.seed is not None else setting("seed")),
        "Hardware": head.environment.get("hardware", ""),
        "Time": duration(head.wall_s) if head.wall_s is not None else "",
        "Versions": ", ".join(versions_of([run])),
        "Commit": head.environment.get("commit", ""),
        "Date": head.environment.get("date", ""),
    }  # fmt: skip
    return {
        "facts": [(name, str(value)) for name, value in facts.items() if value not in ("", None, "None")],
        "settings": settings_yaml(run.config),
        "command": "sft" if is_supervised(run.config) else "train",
    }


def _joined(first: Any, *others: tuple[str, Any]) -> str:
    """Like "linear, learning rate 1e-06"."""
    if first is None:
        return ""
    told = {name: f"{value:g}" if isinstance(value, float) else value for name, value in others}
    return ", ".join([str(first), *(f"{name} {value}" for name, value in told.items() if value is not None)])


def settings_yaml(config: dict[str, Any]) -> str:
    """The settings that are no defaults, as `--config` reads them; without secrets and what belongs to the machine."""
    defaults = {one.name: _default(one) for one in fields(SFTConfig if is_supervised(config) else GRPOConfig)}
    kept = {
        name: value
        for name, value in config.items()
        if value not in (None, "", [], {})
        and not (name in defaults and value == defaults[name])
        and name not in _OF_THIS_MACHINE
        and not name.startswith("_")
        and not is_secret(name)
    }
    return yaml.safe_dump(kept, sort_keys=True, allow_unicode=True) if kept else ""


def _default(one: Any) -> Any:
    made = one.default if one.default_factory is MISSING else one.default_factory()
    return getattr(made, "value", made)
