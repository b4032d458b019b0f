"""Whether a run that goes on from a checkpoint is the run that saved it."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.utils import logging

from fastgrpo.data.row_dataset import RowDataset, Rows
from fastgrpo.settings.run_config import RunConfig

logger = logging.get_logger(__name__)

FREE = (
    *("output_dir", "run_name", "project", "resume_from_checkpoint", "resume_changed", "report_to", "disable_tqdm"),
    *("push_to_hub", "profile_steps", "num_completions_to_print", "use_cpu", "full_determinism", "token_budget"),
    *(
        "attn_backend",
        "logprob_bytes",
        "vision_cache_bytes",
        "sampler_max_rows",
        "sampler_max_cache_tokens",
        "speculate",
        "deepspeed",
    ),
    *("gradient_checkpointing", "on_nonfinite", "reward_timeout", "local_rank", "load_best_model_at_end", "debug"),
    *("skip_memory_metrics", "torch_empty_cache_steps", "deepspeed"),
)
FREE_KINDS = ("logging_", "log_", "save_", "eval_", "hub_", "dataloader_", "ddp_", "trackio_", "do_", "_")
"""Settings, and beginnings of their names, that change nothing of what is learnt."""


def facts_of(config: RunConfig, rows: Rows, model: nn.Module, method: str, rewards: Sequence[str]) -> dict[str, Any]:
    """What makes a run the run it is, as plain JSON."""
    plan = config.batch_plan
    return {
        "method": method,
        "rows": len(rows) if isinstance(rows, RowDataset) else None,
        "data files": sorted(rows.files),
        "rewards": list(rewards),
        "seed": config.seed,
        "data_seed": config.data_seed,
        "shuffle_dataset": config.shuffle_dataset,
        "num_generations": plan.num_generations,
        "prompts per rollout": [plan.prompts_per_rollout, config.world_size],
        "updates per rollout": plan.updates_per_rollout,
        "num_iterations": plan.num_iterations,
        "optim": str(getattr(config.optim, "value", config.optim)),
        "adapters": _adapters(model),
    }


CANNOT = ("method", "optim", "adapters")
"""Facts that the checkpoint's own state depends on."""


def _adapters(model: nn.Module) -> dict[str, str] | None:
    if not isinstance(model, PeftModel):
        return None
    told = {}
    for name, one in model.peft_config.items():
        targets = one.target_modules if hasattr(one, "target_modules") else None
        targets = sorted(targets) if isinstance(targets, set | list | tuple) else targets
        told[name] = f"{one.peft_type.value} of rank {getattr(one, 'r', None)} on {targets}"
    return told


def require_same_run(checkpoint: Any, state: Mapping[str, Any], facts: Mapping[str, Any], config: RunConfig) -> None:
    """Warns of settings that have changed since a checkpoint was saved, all in one line.

    Args:
        state: what the checkpoint knows: `facts` and `settings`; one that knows neither is taken as it is.

    Raises:
        ValueError: what has changed makes another run of it and `resume_changed` is off; or the checkpoint's optimizer
            or adapters are of another kind.
    """
    was = state.get("facts", {})
    other = [name for name in facts if name in was and not _alike(name, was[name], facts[name])]
    told = {name: f"{name} {_short(was[name])} → {_short(facts[name])}" for name in other}
    if cannot := [told[name] for name in CANNOT if name in told]:
        raise ValueError(
            f"{checkpoint} cannot be gone on from: {'; '.join(cannot)}. Resume with what it was saved with, or start a "
            "new run with it as --model_name_or_path."
        )
    if told and not config.resume_changed:
        raise ValueError(
            f"{checkpoint} was saved by a run with other settings: {'; '.join(told.values())}. Resume with those it "
            "had, pass --resume_changed to go on all the same, or choose another output_dir for a new run."
        )
    settings, saved = config.to_dict(), state.get("settings", {})
    for name, value in settings.items():
        free = name in FREE or name.startswith(FREE_KINDS) or name in facts
        if name in saved and not free and str(saved[name]) != str(value):
            told[name] = f"{name} {_short(saved[name])} → {_short(value)}"
    if told:
        logger.warning(f"Going on from {checkpoint} under other settings: {'; '.join(told.values())}.")


def _alike(name: str, was: Any, now: Any) -> bool:
    if name == "prompts per rollout":  # of a rank, and ranks: a run may move to another number of these
        return bool(was[0] == now[0] or was[0] * was[1] == now[0] * now[1])
    return bool(was == now)


def _short(value: Any) -> str:
    text = "none" if value in (None, [], {}) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
