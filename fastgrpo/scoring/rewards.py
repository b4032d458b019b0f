"""Reward functions: the built-in ones, those a user names, and calling them on a rollout.

A reward function is called as in TRL, with keyword arguments alone and one entry per completion: `prompts` and
`completions` (texts, or lists of chat messages for chat prompts), `completion_ids` (lists of token ids), every column
of the data by name, and `trainer_state`, `log_extra`, `log_metric`. It also gets `prompt_texts`, which TRL lacks: the
prompts as the model reads them, with what a chat template writes behind the last message. It returns a number per
completion, or None where it abstains. It may be `async`.
"""

import asyncio
import difflib
import importlib
import inspect
import logging
import math
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgrpo.scoring.answers import answers_match, parse_answer
from fastgrpo.scoring.golds import gold_text, option_texts
from fastgrpo.types import Rollout

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

LARGEST = torch.finfo(torch.float32).max

_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_RESERVED = {"prompt", "prompts", "prompt_texts", "completion", "completions", "completion_ids"} | {
    "trainer_state",
    "log_extra",
    "log_metric",
}


def accuracy_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    solution: Sequence[Any] | None = None,
    choices: Sequence[Any] | None = None,
    **_: Any,
) -> list[float | None]:
    """1 where the tagged answer is the gold one (`answers.answers_match`), else 0; None without a solution.

    Args:
        solution: gold answers, in any form that `golds.gold_text` reads.
        choices: the options of each question, in any form that `golds.option_texts` reads, or None.

    Raises:
        ValueError: the data has no `solution` column, or a gold answer that cannot be read.
    """
    if solution is None:
        raise ValueError(
            "the accuracy reward needs a `solution` column; add one, or leave `accuracy` out of reward_funcs."
        )
    options = [None] * len(completions) if choices is None else choices
    return [
        None if gold is None else float(is_correct(parse_answer(_text(completion)), gold, listed))
        for completion, gold, listed in zip(completions, solution, options, strict=True)
    ]


def is_correct(answer: str | None, solution: Any, choices: Any) -> bool:
    """Whether an answer is a row's gold one; without an answer it is not.

    Raises:
        RowError: a gold answer or options that cannot be read.
    """
    options = None if choices is None else option_texts(choices)
    gold = gold_text(solution)
    return answer is not None and answers_match(answer, gold, options)


def format_reward(
    prompts: Sequence[Any], completions: Sequence[Any], prompt_texts: Sequence[str] | None = None, **_: Any
) -> list[float | None]:
    """1 where the completion is `<think>…</think> <answer>…</answer>` and nothing else, each tag once; else 0.

    White space around is allowed. What the prompt opens counts as the completion's: a `<think>` at its end (base mode,
    templates of reasoning models), or an empty `<think></think>` (such templates with thinking off).
    """
    opened = prompts if prompt_texts is None else prompt_texts
    texts = [_opening(prompt) + _text(completion) for prompt, completion in zip(opened, completions, strict=True)]
    return [float(_FORM.fullmatch(text) is not None and all(text.count(t) == 1 for t in _TAGS)) for text in texts]


def length_reward(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
) -> list[float | None]:
    """0.001 per completion token: a control, which rewards length alone."""
    return [0.001 * len(ids) for ids in completion_ids]


REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "length": length_reward,
}


def _text(completion: str | Sequence[dict[str, Any]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _opening(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The tags with which a prompt, or the start of the assistant's turn in it, opens the completion."""
    if not isinstance(prompt, str):
        last = prompt[-1] if prompt else {}
        prompt = last["content"] if last.get("role") == "assistant" and isinstance(last["content"], str) else ""
    found = _OPENING.search(prompt)
    return found[0] if found else ""


def resolve_reward_functions(specs: Sequence[str | RewardFunction]) -> list[RewardFunction]:
    """Reward functions by name ("accuracy", "format", "length"), by import path, or as is.

    A path is "package.module:function", or "package.module.function" as in TRL.

    Raises:
        ValueError: an unknown name, or a path that cannot be imported.
    """
    return [_resolve(spec) if isinstance(spec, str) else spec for spec in specs]


def _resolve(spec: str) -> RewardFunction:
    if spec in REWARD_FUNCTIONS:
        return REWARD_FUNCTIONS[spec]
    module_name, separator, attribute = spec.partition(":") if ":" in spec else spec.rpartition(".")
    if not separator:
        close = difflib.get_close_matches(spec, REWARD_FUNCTIONS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"reward_funcs: {spec!r} is not a reward function. Use {', '.join(REWARD_FUNCTIONS)}, or an import path "
            f"such as `my_package.my_module:my_reward`.{hint}"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"reward_funcs: {spec!r} cannot be imported: {type(error).__name__}: {error}. Is the module in this folder "
            "or on PYTHONPATH?"
        ) from error
    if not callable(function):
        raise ValueError(f"reward_funcs: {spec!r} is a {type(function).__name__}, not a function.")
    return function


def reads_golds(functions: Sequence[RewardFunction]) -> bool:
    """Whether a function among these compares answers with `solution`: rows whose gold it cannot read are of no use."""
    return any(inspect.unwrap(getattr(function, "func", function)) is accuracy_reward for function in functions)


def reward_name(function: RewardFunction) -> str:
    """The name under which a reward function is logged: its own, or its class's."""
    wrapped = inspect.unwrap(getattr(function, "func", function))
    return getattr(wrapped, "__name__", type(wrapped).__name__)


def score(
    groups: Sequence[Rollout],
    reward_functions: Sequence[RewardFunction],
    trainer_state: Any = None,
    log_extra: Callable[..., None] | None = None,
    log_metric: Callable[..., None] | None = None,
    nan_rewards: str = "raise",
) -> Tensor:
    """[completions, F] float32: what each function says of each completion, group by group; NaN where it abstained.

    Functions run one after the other, asynchronous ones together.

    Args:
        trainer_state, log_extra, log_metric: handed through to the functions.
        nan_rewards: "abstain" takes a reward that is not finite for None; "raise" does not.

    Raises:
        ValueError: a function raised, or returned something else than one finite number or None per completion.
    """
    arguments = {
        **_arguments(groups),
        "trainer_state": trainer_state,
        "log_extra": log_extra or _ignore,
        "log_metric": log_metric or _ignore,
    }
    count = len(arguments["completions"])
    if not count:  # every row of the batch was skipped
        return torch.zeros(0, len(reward_functions))
    results = [_call(function, arguments) for function in reward_functions]
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if pending:
        awaited = _await_all([(reward_functions[i], results[i]) for i in pending], count)
        for i, result in zip(pending, awaited, strict=True):
            results[i] = result
    places = [(completion.row_id, completion.index) for _, completions in groups for completion in completions]
    columns = [
        _validated(reward_name(function), result, places, nan_rewards)
        for function, result in zip(reward_functions, results, strict=True)
    ]
    return torch.tensor(columns, dtype=torch.float32).view(len(columns), count).T.contiguous()


def _arguments(groups: Sequence[Rollout]) -> dict[str, Any]:
    """The keyword arguments of a reward function: one entry per completion in each."""
    pairs = [(prompt, completion) for prompt, completions in groups for completion in completions]
    names = {name: None for prompt, _ in groups for name in prompt.columns if name not in _RESERVED}
    return {
        "prompts": [p.text if p.messages is None else p.messages for p, _ in pairs],
        "prompt_texts": [p.text for p, _ in pairs],
        "completions": [c.text if p.messages is None else [{"role": "assistant", "content": c.text}] for p, c in pairs],
        "completion_ids": [c.token_ids.tolist() for _, c in pairs],
        **{name: [p.columns.get(name) for p, _ in pairs] for name in names},
    }


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _call(function: RewardFunction, arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        raise _failure(function, error, len(arguments["completions"])) from error


def _await_all(pending: Sequence[tuple[RewardFunction, Any]], count: int) -> list[Any]:
    async def finish(function: RewardFunction, result: Any) -> Any:
        try:
            return await result
        except Exception as error:
            raise _failure(function, error, count) from error

    async def finish_all() -> list[Any]:
        return await asyncio.gather(*(finish(function, result) for function, result in pending))

    return asyncio.run_coroutine_threadsafe(finish_all(), _event_loop()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, on its own thread: clients that functions keep stay usable between calls, and it
    works where a loop is running already, as in a notebook."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward-functions", daemon=True).start()
    return loop


def _failure(function: RewardFunction, error: Exception, count: int) -> ValueError:
    return ValueError(
        f"reward function {reward_name(function)!r} failed on {count} completions: {type(error).__name__}: {error}"
    )


def _validated(name: str, result: Any, places: Sequence[tuple[int, int]], nan_rewards: str) -> list[float]:
    """A function's rewards; `places` are the completions' rows and their indices within."""
    count = len(places)
    if isinstance(result, Tensor):
        result = result.tolist()
    if not hasattr(result, "__len__") or isinstance(result, str | dict):
        raise ValueError(
            f"reward function {name!r} returned {type(result).__name__}: return a list of {count} numbers."
        )
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
        value = float(reward)
    except (TypeError, ValueError) as error:
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
