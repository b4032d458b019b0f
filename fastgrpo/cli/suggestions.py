"""What a misspelt flag, setting or command was meant to be."""

import difflib
from collections.abc import Iterable

SAID_FOR = {
    "batch_size": "per_device_train_batch_size",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "gas": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "group_size": "num_generations",
    "kl_coef": "beta",
    "lora": "use_peft",
    "lr": "learning_rate",
    "max_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "model": "model_name_or_path",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "rewards": "reward_funcs",
    "steps": "max_steps",
    "wd": "weight_decay",
}
"""Common names of a setting → ours, where the letters differ too much to be matched."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` stands for: by `SAID_FOR`, by its words, or by its letters; None where none is near.

    Names may begin with dashes and join their words with dashes; so does the answer, where a known name does.
    """
    plain = _plain(name)
    if not plain:
        return None
    names = {option: _plain(option) for option in sorted(known)}
    meant = SAID_FOR.get(plain)
    # As dashes or underscores are used in what was typed.
    styled = sorted(names, key=lambda option: "-" in option.lstrip("-") and "-" not in name.lstrip("-"))
    if meant in names.values():
        return next(option for option in styled if names[option] == meant)
    words = set(plain.split("_"))
    holding = [option for option in styled if words <= set(names[option].split("_"))]
    if holding:
        return min(holding, key=lambda option: len(names[option]))
    alike = difflib.get_close_matches(name, styled, n=1, cutoff=0.5)
    return alike[0] if alike else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message about an unknown name."""
    found = nearest(name, known)
    return f" (did you mean {found}?)" if found else otherwise


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
