"""Reward functions: the built-in ones, those a user names, and calling them on a rollout.

A reward function is called as in TRL, with keyword arguments alone and one entry per completion: `prompts` and
`completions` (texts, or lists of chat messages for chat prompts), `completion_ids` (lists of token ids), every column
of the data by name, and `trainer_state`, `log_extra`, `log_metric`. It also gets `prompt_texts`, which TRL lacks: the
prompts as the model reads them, with what a chat template writes behind the last message. It returns a number per
completion, or None where it abstains. It may be `async`. It is called once, on all completions of a rollout, or where
it is marked `per_group`, once on each group, several at a time.
"""

import difflib
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.rewards import (
    PerGroup,
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from fastgrpo.scoring.guard import described
from fastgrpo.scoring.reward_calls import GroupCall, RewardFunction, await_all, call, results_of, reward_name
from fastgrpo.scoring.tagged import tagged_accuracy, tagged_format, token_length
from fastgrpo.types import Completion, Prompt, Rollout

logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float32).max

_RESERVED = {"prompt", "prompts", "prompt_texts", "completion", "completions", "completion_ids"} | {
    "trainer_state",
    "log_extra",
    "log_metric",
}
REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    "accuracy": tagged_accuracy,
    "format": tagged_format,
    "length": token_length,
    "tagged_accuracy": tagged_accuracy,
    "tagged_format": tagged_format,
    "token_length": token_length,
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}
"""The first three are short names of the next three; the last four are TRL's, with its program's settings."""


def resolve_reward_functions(specs: Sequence[Any]) -> list[Any]:
    """Reward functions by name (`REWARD_FUNCTIONS`), by import path, or as is.

    A path is "package.module:function", or "package.module.function" as in TRL. The name of a reward model, a folder or
    a hub id, stays as it is.

    Raises:
        ValueError: an unknown name, or a path that cannot be imported.
    """
    return [_resolve(spec) if isinstance(spec, str) and not names_a_model(spec) else spec for spec in specs]


def names_a_model(spec: str) -> bool:
    """Whether a reward's name is that of a model rather than of a function."""
    return Path(spec).is_dir() or ("/" in spec and ":" not in spec)


def _resolve(spec: str) -> RewardFunction:
    if spec in REWARD_FUNCTIONS:
        return REWARD_FUNCTIONS[spec]
    module_name, separator, attribute = spec.partition(":") if ":" in spec else spec.rpartition(".")
    if not separator:
        close = difflib.get_close_matches(spec, REWARD_FUNCTIONS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"reward_funcs: {spec!r} is not a reward function. Use {', '.join(REWARD_FUNCTIONS)}, an import path such "
            f"as `my_package.my_module:my_reward`, or the folder or hub id of a reward model.{hint}"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise ValueError(
            f"reward_funcs: {spec!r} cannot be imported: {type(error).__name__}: {error}. Is the module in this folder "
            "or on PYTHONPATH?"
        ) from error
    if not callable(function):
        raise ValueError(f"reward_funcs: {spec!r} is a {type(function).__name__}, not a function.")
    return function


def reads_golds(functions: Sequence[RewardFunction]) -> bool:
    """Whether a function among these compares answers with `solution`: rows whose gold it cannot read are of no use."""
    return any(inspect.unwrap(getattr(function, "func", function)) is tagged_accuracy for function in functions)


class EarlyCalls:
    """Calls of `per_group` functions on groups as they are drawn, while others still are.

    Args:
        functions: all reward functions; the others are left alone.
        handed: what they get beside completions.
        columns: names of the whole batch's columns: every group has them, as when all are scored together.
        timeout: see `score`.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        handed: Mapping[str, Any],
        columns: Iterable[str] = (),
        timeout: float | None = None,
    ) -> None:
        self.functions = {i: function for i, function in enumerate(functions) if isinstance(function, PerGroup)}
        self.handed, self.columns, self.timeout = handed, tuple(columns), timeout
        self._calls: dict[int, tuple[Rollout, dict[int, GroupCall]]] = {}

    def start(self, group: Rollout) -> Rollout:
        """Calls the functions on a group, which it returns, without waiting for them."""
        if self.functions:
            given = {**reward_arguments([group], self.columns), **self.handed}
            calls = {i: GroupCall(function, given, self.timeout) for i, function in self.functions.items()}
            self._calls[id(group)] = group, calls
        return group

    def of(self, groups: Sequence[Rollout]) -> dict[tuple[int, int], GroupCall]:
        """(function, group) → its call, of those that were started on these very groups."""
        started = [(g, self._calls[id(group)][1]) for g, group in enumerate(groups) if id(group) in self._calls]
        return {(f, g): one for g, calls in started for f, one in calls.items()}


def score(
    groups: Sequence[Rollout],
    reward_functions: Sequence[RewardFunction],
    trainer_state: Any = None,
    log_extra: Callable[..., None] | None = None,
    log_metric: Callable[..., None] | None = None,
    nan_rewards: str = "raise",
    timeout: float | None = None,
    early: EarlyCalls | None = None,
) -> Tensor:
    """[completions, F] float32: what each function says of each completion, group by group; NaN where it abstained.

    Functions run one after the other, asynchronous ones together; beside them those that are called group by group.

    Args:
        trainer_state, log_extra, log_metric: handed through to the functions.
        nan_rewards: "abstain" takes a reward that is not finite for None; "raise" does not.
        timeout: seconds that one call of a function may take; None: as long as it takes.
        early: calls that were started before.

    Raises:
        ValueError: a function raised, took too long, or returned something else than one finite number or None per
            completion.
    """
    places = [(completion.row_id, completion.index) for _, completions in groups for completion in completions]
    handed = {"trainer_state": trainer_state, "log_extra": log_extra or _ignore, "log_metric": log_metric or _ignore}
    arguments = {**reward_arguments(groups), **handed}
    started = {} if early is None else early.of(groups)
    return call_functions(reward_functions, arguments, places, nan_rewards, timeout, started)


def call_functions(
    reward_functions: Sequence[RewardFunction],
    arguments: Mapping[str, Any],
    places: Sequence[tuple[int, int]],
    nan_rewards: str = "raise",
    timeout: float | None = None,
    started: Mapping[tuple[int, int], GroupCall] | None = None,
) -> Tensor:
    """As `score`, from the functions' keyword arguments; `places` are the completions' rows and indices within, of
    which 0 begins a group."""
    count = len(places)
    if not count:  # every row of the batch was skipped
        return torch.zeros(0, len(reward_functions))
    starts = [i for i, (_, index) in enumerate(places) if index == 0]
    groups = [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]
    given = started or {}
    calls = {
        f: [given.get((f, g)) or GroupCall(function, _part(arguments, one), timeout) for g, one in enumerate(groups)]
        for f, function in enumerate(reward_functions)
        if isinstance(function, PerGroup)
    }
    results: list[Any] = [
        results_of(calls[f], arguments["log_extra"], arguments["log_metric"])
        if f in calls
        else call(function, arguments, timeout)
        for f, function in enumerate(reward_functions)
    ]
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if pending:
        finished = await_all([(reward_functions[i], results[i]) for i in pending], count, timeout)
        for i, result in zip(pending, finished, strict=True):
            results[i] = result
    columns = []
    for f, (function, result) in enumerate(zip(reward_functions, results, strict=True)):
        parts = zip(groups, result, strict=True) if f in calls else [(slice(None), result)]
        name = reward_name(function)
        columns.append([value for part, one in parts for value in _validated(name, one, places[part], nan_rewards)])
    return torch.tensor(columns, dtype=torch.float32).view(len(columns), count).T.contiguous()


def _part(arguments: Mapping[str, Any], part: slice) -> dict[str, Any]:
    return {name: value[part] if isinstance(value, list) else value for name, value in arguments.items()}


def reward_arguments(groups: Sequence[Rollout], more: Iterable[str] = ()) -> dict[str, list[Any]]:
    """The keyword arguments that a reward function reads completions from: one entry per completion in each.

    `more`: names of columns that other groups have.
    """
    pairs = [(prompt, completion) for prompt, completions in groups for completion in completions]
    shown = {id(prompt): shown_prompt(prompt) for prompt, _ in groups}
    columns = [{**prompt.columns, **completion.columns} for prompt, completion in pairs]
    names = {name: None for row in [*columns, dict.fromkeys(more)] for name in row if name not in _RESERVED}
    return {
        "prompts": [shown[id(p)] for p, _ in pairs],
        "prompt_texts": [p.text for p, _ in pairs],
        "completions": [c.text if p.messages is None else turns_of(c) for p, c in pairs],
        "completion_ids": [c.token_ids.tolist() for _, c in pairs],
        **{name: [row.get(name) for row in columns] for name in names},
    }


def turns_of(completion: Completion) -> list[dict[str, Any]]:
    """A completion as messages."""
    return completion.messages or [{"role": "assistant", "content": completion.text}]


def shown_prompt(prompt: Prompt) -> str | list[dict[str, Any]]:
    """A prompt as TRL shows it to users' functions: a text, or a conversation with a picture in each image part.

    Where there are pictures, texts stand in parts too.
    """
    if prompt.messages is None:
        return prompt.text
    pictures = iter(prompt.images)

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": next(pictures)} if one["type"] == "image" else one

    def content(value: Any) -> list[dict[str, Any]]:
        return [{"type": "text", "text": value}] if isinstance(value, str) else [part(one) for one in value or ()]

    if not prompt.images:
        return prompt.messages
    return [{**message, "content": content(message.get("content"))} for message in prompt.messages]


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _validated(name: str, result: Any, places: Sequence[tuple[int, int]], nan_rewards: str) -> list[float]:
    """A function's rewards; `places` are the completions' rows and their indices within."""
    count = len(places)
    kind = type(result).__name__
    result = result.tolist() if hasattr(result, "tolist") else result
    if not hasattr(result, "__len__") or isinstance(result, str | bytes | bytearray | Mapping | Set):
        raise ValueError(f"reward function {name!r} returned {kind}: return a list of {count} numbers.")
    try:
        result = list(result)
    except Exception as error:
        raise ValueError(f"reward function {name!r} returned {kind} that cannot be read: {described(error)}") from error
    if len(result) != count:
        raise ValueError(
            f"reward function {name!r} returned {len(result)} rewards for {count} completions: return one for each."
        )
    return [_number(name, place, reward, nan_rewards) for place, reward in zip(places, result, strict=True)]


def _number(name: str, place: tuple[int, int], reward: Any, nan_rewards: str) -> float:
    """A reward as a float that float32 holds; NaN for None."""
    if reward is None:
        return math.nan
    said = f"reward function {name!r} returned {reward!r} for completion {place[1]} of row {place[0]}"
    try:
        if isinstance(reward, str | bytes):
            raise TypeError("a text")
        value = float(reward)
    except Exception as error:
        raise ValueError(f"{said}: return a number, or None to abstain.") from error
    if abs(value) <= LARGEST:  # of NaN it is not
        return value
    if nan_rewards != "abstain":
        raise ValueError(f"{said}: return None to abstain, or pass --nan_rewards abstain to take it so.")
    _warn_once(f"reward function {name!r} returned numbers that are not finite: taken as abstentions (nan_rewards).")
    return math.nan


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
