"""What users pass as rewards, in its many forms, into functions that score completions."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastgrpo.config import GRPOConfig
from fastgrpo.model.reward_model import RewardModel, load_reward_model, load_reward_tokenizer
from fastgrpo.rewards import PerGroup
from fastgrpo.scoring.rewards import RewardFunction, resolve_reward_functions, reward_name

logger = logging.getLogger(__name__)


def load_reward_functions(
    given: Any, tokenizers: Any, config: GRPOConfig, more: Sequence[RewardFunction] = ()
) -> list[RewardFunction]:
    """Reward functions from names, import paths, functions and reward models, one of these or a list.

    Args:
        tokenizers: one for each of `given`, or None where a reward model's own is to be loaded; what is given for a
            function is not used.
        more: further functions, behind those.

    Raises:
        ValueError: nothing given, something that is no reward, or lists of different lengths.
    """
    specs = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not specs and not more:
        raise ValueError(
            "reward_funcs is missing. No reward source provided: pass a reward function, a reward model or a list of "
            "them, or an environment with get_reward()."
        )
    tokenizers = [None] * len(specs) if tokenizers is None else tokenizers
    tokenizers = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers]
    if len(tokenizers) != len(specs):
        raise ValueError(
            f"reward_processing_classes: {len(tokenizers)} for {len(specs)} reward_funcs; their numbers must match. "
            "Give None for a function."
        )
    resolved = resolve_reward_functions(specs)
    loaded = [_loaded(spec, tokenizer, config) for spec, tokenizer in zip(resolved, tokenizers, strict=True)]
    return [*loaded, *more]


def _loaded(spec: Any, tokenizer: Any, config: GRPOConfig) -> RewardFunction:
    revision = None
    if isinstance(spec, str):
        spec, revision = load_reward_model(spec, config.model_kwargs, config.trust_remote_code)
    if isinstance(spec, nn.Module):
        if tokenizer is None:
            tokenizer = load_reward_tokenizer(spec, revision, config.trust_remote_code)
        return RewardModel(spec, tokenizer, config.template_kwargs)
    if isinstance(spec, PerGroup) and isinstance(spec.func, nn.Module):
        raise ValueError("reward_funcs: per_group is for functions: pass the reward model as it is.")
    if not callable(spec):
        raise ValueError(
            f"reward_funcs: {spec!r} is a {type(spec).__name__}: pass a function, a name or a reward model."
        )
    function: RewardFunction = spec
    return function


def as_given(functions: Sequence[RewardFunction]) -> list[Any]:
    """The functions, and the models within those that are reward models."""
    return [function.model if isinstance(function, RewardModel) else function for function in functions]


def place_reward_models(functions: Sequence[RewardFunction], device: torch.device) -> None:
    """Moves reward models to where completions are scored."""
    for function in functions:
        if isinstance(function, RewardModel):
            function.to(device)


def tell_of_late_calls(functions: Sequence[RewardFunction], reasons: Sequence[str]) -> None:
    """Says for what reasons, if any, `per_group` functions are called no earlier than the others."""
    names = [reward_name(function) for function in functions if isinstance(function, PerGroup)]
    if names and reasons:
        told = "; ".join(reasons)
        logger.warning("per_group: %s waits until all completions are drawn: %s.", ", ".join(names), told)
