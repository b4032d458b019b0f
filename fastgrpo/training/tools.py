"""Tools that the model may call: functions, and the methods of environments (`tools`, `environment_factory`)."""

import asyncio
import inspect
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from fastgrpo.config import GRPOConfig
from fastgrpo.scoring.reward_calls import RewardFunction, event_loop

Tool = Callable[..., Any]
Call = dict[str, Any]
"""A tool call as chat templates read it: {"type": "function", "function": {"name": …, "arguments": {…}}}."""

EMPTY_PROMPT = [{"role": "user", "content": ""}]
"""Of rows without a prompt, which their environment gives."""
WITH_PROMPT = {"prompt", "messages", "question", "problem"}

BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\s*(.*?)\s*</parameter>", re.DOTALL)


class ToolBox:
    """The tools of a run, and its environments, one instance for each completion of a rollout.

    Args:
        tools: functions with type hints and a docstring in Google's style, `async` ones too.
        environment_factory: makes an environment: an object with `reset(**row)`, whose other public methods are tools.
            If it has `get_reward()`, that is one more reward. A dict has several; a row's `environment` names one.

    Raises:
        ValueError: an environment without `reset`.
    """

    def __init__(self, tools: Sequence[Tool] | None = None, environment_factory: Any = None) -> None:
        self.chooses = isinstance(environment_factory, dict)
        """Whether rows name their environment."""
        factories = environment_factory if self.chooses or not environment_factory else {None: environment_factory}
        self.factories: Mapping[str | None, Callable[[], Any]] = factories or {}
        self.pool: dict[str | None, list[Any]] = {name: [make()] for name, make in self.factories.items()}
        for (instance,) in self.pool.values():
            if not callable(getattr(instance, "reset", None)):
                raise ValueError(f"environment_factory: {type(instance).__name__} has no method `reset`.")
        self.functions = list(tools or ())
        """Of no environment."""
        probes = {name: methods_of(instance) for name, (instance,) in self.pool.items()} or {None: []}
        self.of_environment: dict[str | None, list[Tool]] = {
            name: [*self.functions, *methods] for name, methods in probes.items()
        }
        self.schemas = {name: [get_json_schema(tool) for tool in own] for name, own in self.of_environment.items()}
        """What a prompt says of its tools, by the row's environment."""
        self.environments: list[Any] = []
        """Those of the last rollout's completions."""

    def __bool__(self) -> bool:
        return bool(self.functions or self.factories)

    @property
    def all(self) -> list[Tool]:
        """Every tool, of whichever environment."""
        return [*self.functions, *(tool for pool in self.pool.values() for tool in methods_of(pool[0]))]

    def reward_functions(self) -> list[RewardFunction]:
        """The rewards that environments give, one for each class of them."""
        kinds = {type(instances[0]): None for instances in self.pool.values()}
        return [owned_reward(kind) for kind in kinds if hasattr(kind, "get_reward")]

    def with_prompts(self, dataset: Any, config: GRPOConfig) -> Any:
        """The rows to train on, with an empty prompt where they have none; None: as many as a rollout takes.

        Raises:
            ValueError: no rows, where something else than a single environment is to say what to ask.
        """
        if dataset is None:
            if not self.factories or self.chooses:
                where = "where rows choose among environments, environment_factory requires a `train_dataset`"
                raise ValueError(f"`train_dataset` is required: pass rows to train on; {where}.")
            if config.max_steps <= 0:
                raise ValueError("environment_factory without train_dataset has no end: set max_steps.")
            count = config.batch_plan.prompts_per_rollout * config.world_size
            return [{"prompt": EMPTY_PROMPT} for _ in range(count)]
        if not self.factories or not hasattr(dataset, "__iter__"):
            return dataset
        columns = set(getattr(dataset, "column_names", None) or next(iter(dataset), ()))
        if WITH_PROMPT & columns:
            return dataset
        if isinstance(dataset, list):
            return [{**row, "prompt": EMPTY_PROMPT} for row in dataset]
        return dataset.map(lambda _: {"prompt": EMPTY_PROMPT})

    def take(self, names: Sequence[str | None]) -> list[Any]:
        """An environment for each completion, by the environments' names; none where there are none.

        Raises:
            ValueError: an unknown name.
        """
        used: Counter[str | None] = Counter()
        self.environments = []
        for name in names if self.factories else ():
            if name not in self.factories:
                raise ValueError(
                    f"environment={name!r} is not among the environments of environment_factory, "
                    f"{list(self.factories)}: name one of them in every row."
                )
            if used[name] == len(self.pool[name]):
                self.pool[name].append(self.factories[name]())
            self.environments.append(self.pool[name][used[name]])
            used[name] += 1
        return self.environments

    def tools_of(self, environment: Any) -> dict[str, Tool]:
        """By name, what may be called where this is the environment (None: none)."""
        return {tool.__name__: tool for tool in (*self.functions, *methods_of(environment))}


def methods_of(environment: Any) -> list[Tool]:
    """The methods of an environment that are tools."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    return [getattr(environment, name) for name in names if name[0] != "_" and name not in ("reset", "get_reward")]


def owned_reward(kind: Any) -> RewardFunction:
    """What the environments of a class say of their completions; None for completions of other environments."""

    def reward(environments: Sequence[Any], **_: Any) -> Any:
        values: list[Any] = [one.get_reward() if type(one) is kind else None for one in environments]
        return _awaited(values) if any(map(inspect.isawaitable, values)) else values

    reward.__name__ = kind.__name__
    return reward


def call_tools(calls: Sequence[tuple[Mapping[str, Tool], Call]]) -> list[tuple[Any, bool]]:
    """What each call gives, and whether it failed; then it is {"error": why}. Asynchronous tools run together."""
    results = [_called(tools, call["function"]) for tools, call in calls]
    if any(inspect.isawaitable(result) for result, _ in results):
        finished = asyncio.run_coroutine_threadsafe(_awaited([result for result, _ in results]), event_loop()).result()
        results = [
            ({"error": str(result)}, True) if isinstance(result, Exception) else (result, failed)
            for result, (_, failed) in zip(finished, results, strict=True)
        ]
    return results


def _called(tools: Mapping[str, Tool], function: Mapping[str, Any]) -> tuple[Any, bool]:
    try:
        if function["name"] not in tools:
            raise ValueError(f"Tool {function['name']} not found.")
        return tools[function["name"]](**function["arguments"]), False
    except Exception as error:  # whatever the model asked for, and whatever a user's tool raises
        return {"error": str(error)}, True


async def _awaited(values: Sequence[Any]) -> list[Any]:
    async def one(value: Any) -> Any:
        return await value if isinstance(value, Awaitable) else value

    return await asyncio.gather(*map(one, values), return_exceptions=True)


def read_turn(tokenizer: Any, ids: list[int], prefix: list[int], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that an assistant's tokens are, with `tool_calls` where it calls tools.

    They are read by the tokenizer's `response_template`; without one, JSON and XML calls in <tool_call> tags (Qwen's)
    are. Calls that cannot be read are text.

    Args:
        prefix: the prompt's tokens.
        tools: JSON schemas.
    """
    try:
        if getattr(tokenizer, "response_template", None) is not None:
            message = tokenizer.parse_response(ids, prefix=prefix, tools=tools)
            calls = [_checked(call["function"]) for call in message.pop("tool_calls", None) or ()]
            message |= {"role": "assistant", "content": message.get("content") or ""}
        else:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            calls = [_read_call(block, tools) for block in BLOCK.findall(text)]
            message = {"role": "assistant", "content": BLOCK.sub("", text).strip() if calls else text}
    except (ValueError, TypeError, KeyError):
        return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    return message | ({"tool_calls": calls} if calls else {})


def _read_call(block: str, tools: Sequence[dict[str, Any]]) -> Call:
    if (found := FUNCTION.search(block)) is None:
        return _checked(json.loads(block))
    name, body = found.groups()
    own: dict[str, Any] = next((tool["function"] for tool in tools if tool["function"]["name"] == name), {})
    kinds = own.get("parameters", {}).get("properties", {})
    arguments = {
        key: value if kinds.get(key, {}).get("type") == "string" else json.loads(value)
        for key, value in PARAMETER.findall(body)
    }
    return _checked({"name": name, "arguments": arguments})


def _checked(function: Any) -> Call:
    if not isinstance(function["name"], str) or not isinstance(function["arguments"], dict):
        raise ValueError(f"{function!r} is no tool call")
    return {"type": "function", "function": {"name": function["name"], "arguments": function["arguments"]}}
