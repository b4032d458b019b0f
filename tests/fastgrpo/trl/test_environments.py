"""Environments: what they open with, whose methods the model calls, what they reward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from scripted_turns import CHAT, END, TEMPLATE, call

from fastgrpo.demo.base_model import load_tokenizer
from fastgrpo.training.tools import ToolBox

Run = Callable[..., tuple[Any, dict[str, Any], dict[str, Any]]]


class Counting:
    """An environment that adds up; it says its reward."""

    def reset(self, **row: Any) -> str:
        self.row, self.total = row, 0
        return " Count!"

    def add(self, step: int) -> int:
        """
        Adds.

        Args:
            step: How much.
        """
        self.total += step
        return self.total

    def get_reward(self) -> float:
        return float(self.total)


class Shouting:
    """One without a reward, whose reset says nothing."""

    def reset(self, **row: Any) -> None:
        self.heard: list[str] = []

    def shout(self, text: str) -> str:
        """
        Shouts.

        Args:
            text: What.
        """
        self.heard.append(text)
        return text.upper()


def test_an_environment_opens_answers_and_rewards(run: Run) -> None:
    rows = [{**CHAT[0], "level": 7}]
    script = [[call("add", step=2), call("subtract", step=2)], ["Done.", "Oh."]]
    trainer, line, seen = run(script, rows, environment_factory=Counting)
    assert trainer.model.asked[0] == ["(add) user: 3 by 4? Count!" + END + "\nassistant: "] * 2
    assert [one.total for one in trainer.environments] == [2, 0]
    assert trainer.environments[0].row == {"level": 7, "prompt": CHAT[0]["prompt"]}
    assert seen["environments"] == trainer.environments
    assert trainer.reward_func_names == ["reward", "Counting"]
    assert line["rewards/Counting/mean"] == 1
    assert [tool.__name__ for tool in trainer.tools] == ["add"]


def test_it_may_give_the_prompts_and_the_reward_alone(build: Any, text_model: Path, quick: Any) -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    arguments = {"args": quick(), "processing_class": tokenizer, "environment_factory": Counting}
    trainer = type(build())(str(text_model), **arguments)
    trainer.train()
    assert trainer.environments[0].row == {}
    assert trainer.builder.tokenizer.chat_template == TEMPLATE
    assert trainer.reward_weights.tolist() == [1.0]


def test_rows_choose_theirs(run: Run) -> None:
    rows = datasets.Dataset.from_dict({"environment": ["count", "shout"]})
    script = [[call("add", step=2), "No.", call("shout", text="hi"), call("add", step=1)], ["Done.", "Oh.", "Oh."]]
    both = {"count": Counting, "shout": Shouting}
    trainer, line, seen = run(script, rows, environment_factory=both, per_device_train_batch_size=4)
    assert [asked.split(" user")[0] for asked in trainer.model.asked[0]] == ["(add)"] * 2 + ["(shout)"] * 2
    assert [turns[1:2] and turns[1]["content"] for turns in seen["completions"]] == [
        "2", [], "HI", "{'error': 'Tool add not found.'}"
    ]  # fmt: skip
    assert trainer.environments[0].row == {}
    assert [tool.__name__ for tool in trainer._env_tools["shout"]] == ["shout"]
    assert [len(pool) for pool in trainer._environment_pool.values()] == [2, 2]
    assert line["rewards/Counting/mean"] == 1, "of its own completions alone"
    assert line["tools/failure_frequency"] == pytest.approx(1 / 3)


def test_classes_of_environments_reward_once() -> None:
    box = ToolBox(None, {"a": Counting, "b": Counting, "c": Shouting})
    (reward,) = box.reward_functions()
    one = Counting()
    one.reset()
    assert reward(environments=[one, Shouting()]) == [0.0, None]


def test_an_unknown_environment_is_named(run: Run) -> None:
    rows = datasets.Dataset.from_dict({"environment": ["other"]})
    with pytest.raises(ValueError, match="'other' is not among the environments"):
        run([], rows, environment_factory={"count": Counting})


def test_a_groups_environments_say_the_same(run: Run) -> None:
    class Moody(Counting):
        said = 0

        def reset(self, **row: Any) -> str:
            Moody.said += 1
            return str(Moody.said)

    with pytest.raises(ValueError, match="says different things to completions of row 0"):
        run([], environment_factory=Moody)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"environment_factory": Counting, "max_steps": -1}, "max_steps"),
        ({"environment_factory": {"a": Counting}}, "requires a `train_dataset`"),
        ({"environment_factory": object}, "has no method `reset`"),
        ({}, "`train_dataset` is required"),
    ],
)
def test_rows_or_an_environment_that_gives_them(
    build: Any, text_model: Path, quick: Any, given: dict[str, Any], message: str
) -> None:
    settings = quick(max_steps=given.pop("max_steps", 1))
    with pytest.raises(ValueError, match=message):
        type(build())(str(text_model), "length", settings, **given)
