"""What reward functions get, as TRL hands it to them, and what becomes of what they say."""

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_files import changed, parameters

from fastgrpo.rewards import per_group
from fastgrpo.training.trainer import GRPOTrainer

datasets = pytest.importorskip("datasets")


def seen_by(build: Any, rows: Any, **settings: Any) -> dict[str, Any]:
    """What a reward function was called with in one step."""
    seen: dict[str, Any] = {}

    def look(**given: Any) -> list[float]:
        seen.update(given)
        return [float(i) for i in range(len(given["completions"]))]

    build(reward_funcs=look, train_dataset=rows, shuffle_dataset=False, **settings).train()
    return seen


def test_texts_for_texts(build: Any, texts: list[Any]) -> None:
    seen = seen_by(build, texts)
    assert seen["prompts"] == ["Beautiful is"] * 2 + ["Explicit is better than"] * 2
    assert all(isinstance(completion, str) for completion in seen["completions"])
    assert [len(ids) <= 4 for ids in seen["completion_ids"]] == [True] * 4
    assert isinstance(seen["completion_ids"][0][0], int)


def test_messages_for_conversations(build: Any, chats: list[Any]) -> None:
    seen = seen_by(build, chats)
    assert seen["prompts"][0] == [{"role": "user", "content": "Beautiful is"}]
    assert [list(message) for message in seen["completions"][0]] == [["role", "content"]]
    assert seen["completions"][0][0]["role"] == "assistant"


def test_every_column_but_the_prompt(build: Any, texts: list[Any]) -> None:
    rows = [{**row, "level": i, "question": f"q{i}", "meta": {"a": [i]}} for i, row in enumerate(texts)]
    seen = seen_by(build, datasets.Dataset.from_list(rows))
    assert seen["level"] == [0, 0, 1, 1]
    assert seen["question"] == ["q0", "q0", "q1", "q1"]
    assert seen["meta"][2] == {"a": [1]}
    assert "prompt" not in seen


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]


def test_pictures_come_decoded_in_their_column(build: Any, tiny_model_dir: Path, pictures: list[Any]) -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "Which?"}], "image": picture} for picture in pictures]
    )
    seen = seen_by(build, rows, model=str(tiny_model_dir))
    assert [image.getpixel((3, 3)) for image in seen["image"]] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2


def test_prompts_hold_their_pictures(build: Any, tiny_model_dir: Path, pictures: list[Any]) -> None:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]}
    rows = [{"prompt": [{"role": "system", "content": "Look."}, question], "images": pictures}] * 2
    seen = seen_by(build, rows, model=str(tiny_model_dir))
    system, asked = seen["prompts"][0]
    assert system["content"] == [{"type": "text", "text": "Look."}]
    assert [part["type"] for part in asked["content"]] == ["image", "image", "text"]
    assert [asked["content"][i]["image"].getpixel((0, 0)) for i in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    assert [image.getpixel((0, 0)) for image in seen["images"][0]] == [(255, 0, 0), (0, 0, 255)]


def test_rows_with_and_without_pictures_may_be_mixed(build: Any, tiny_model_dir: Path, pictures: list[Any]) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "Which?"}], "image": pictures[0]},
        {"prompt": [{"role": "user", "content": "Why?"}], "image": None},
    ]
    seen = seen_by(build, rows, model=str(tiny_model_dir))
    assert seen["image"][2:] == [None, None]
    assert seen["prompts"][2] == [{"role": "user", "content": "Why?"}]


def test_the_trainers_state(build: Any, texts: list[Any]) -> None:
    steps = []

    def look(completions: Any, trainer_state: Any, **_: Any) -> list[float]:
        steps.append(trainer_state.global_step)
        return [0.0] * len(completions)

    build(reward_funcs=look, max_steps=2).train()
    assert steps == [0, 1]


def test_log_metric_reaches_the_log_line(build: Any) -> None:
    def measured(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("seen", len(completions))
        return [0.0] * len(completions)

    trainer = build(reward_funcs=measured)
    trainer.train()
    assert trainer.state.log_history[0]["seen"] == 4


def test_log_extra_reaches_the_completions(build: Any) -> None:
    def noted(completions: Any, log_extra: Any, **_: Any) -> list[float]:
        log_extra("length", [len(completion) for completion in completions])
        return [0.0] * len(completions)

    trainer = build(reward_funcs=noted)
    trainer.train()
    assert trainer._logs["extra"]["length"] == [len(text) for text in trainer._logs["completion"]]


def test_asynchronous_functions_run_together(build: Any) -> None:
    running: list[str] = []

    def waits(name: str) -> Any:
        async def reward(completions: Any, **_: Any) -> list[float]:
            running.append(name)
            while len(running) < 2:  # would never end if one waited for the other
                await asyncio.sleep(0)
            return [1.0] * len(completions)

        reward.__name__ = name
        return reward

    trainer = build(reward_funcs=[waits("first"), waits("second"), "length"])
    trainer.train()
    assert sorted(running) == ["first", "second"]
    assert trainer.state.log_history[0]["rewards/second/mean"] == 1.0


def test_groups_are_scored_while_others_are_drawn(build: Any) -> None:
    drawing_on, scored, calls = threading.Event(), threading.Event(), []

    class Waits:
        """An engine whose second group waits for the first one's reward, which waits for the engine to go on."""

        def __init__(self, engine: Any) -> None:
            self.sync, self.engine = engine.sync, engine

        def generate(self, *given: Any, **named: Any) -> Any:
            for rollout in self.engine.generate(*given, **named):
                yield rollout
                drawing_on.set()
                assert scored.wait(60), "no reward before the last group was drawn"

    def judge(completions: Any, **_: Any) -> list[float]:
        calls.append(len(completions))
        assert drawing_on.wait(60)
        scored.set()
        return [float(len(text)) for text in completions]

    trainer = build(reward_funcs=[per_group(judge), "length"], eval_dataset=[{"prompt": "a"}, {"prompt": "b"}])
    trainer.engine = Waits(trainer.engine)
    trainer.train()
    drawing_on.clear()
    scored.clear()
    trainer.evaluate()
    assert calls == [2] * 4


@pytest.mark.parametrize("override", [False, True])
def test_what_is_learnt_and_logged_is_the_same_group_by_group(build: Any, override: bool) -> None:
    def noted(completions: Any, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_metric("seen", 3)
        return [float(sum(map(ord, text)) % 17) for text in completions]

    class Extended(GRPOTrainer):
        def _calculate_rewards(self, *given: Any) -> Any:
            return super()._calculate_rewards(*given)

    found = []
    for function in (noted, per_group(noted)):
        trainer = build(reward_funcs=function, trainer_class=Extended if override else GRPOTrainer, max_steps=2)
        trainer.train()
        lines = [[line[name] for name in ("reward", "grad_norm", "seen")] for line in trainer.state.log_history[:2]]
        found.append((lines, trainer._logs, parameters(trainer)))
    assert found[0][:2] == found[1][:2]
    assert not changed(found[0][2], trainer)


def test_what_cannot_be_called_earlier_says_so(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    def judge(completions: Any, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    build(reward_funcs=per_group(judge), rollout_func=lambda prompts, trainer: {})
    assert "per_group: judge waits until all completions are drawn: rollout_func" in caplog.text
    with pytest.raises(ValueError, match="per_group is for functions"):
        build(reward_funcs=per_group(torch.nn.Linear(1, 1)))


def test_a_function_may_abstain(build: Any) -> None:
    def abstains(completions: Any, **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = build(reward_funcs=[abstains, "length"])
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["reward"] == pytest.approx(line["rewards/token_length/mean"])
    assert "rewards/abstains/mean" not in line


def test_what_is_no_number_ends_the_run_or_abstains(build: Any) -> None:
    def divides(completions: Any, **_: Any) -> list[float]:
        return [float("nan"), *[1.0] * (len(completions) - 1)]

    with pytest.raises(ValueError, match=r"divides.*row \d+.*--nan_rewards abstain"):
        build(reward_funcs=[divides, "length"]).train()
    trainer = build(reward_funcs=[divides, "length"], nan_rewards="abstain")
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/divides/mean"] == 1.0
    assert line["reward"] > line["rewards/token_length/mean"]


def test_a_warning_when_nothing_scores_a_completion(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    def abstains(completions: Any, **_: Any) -> list[None]:
        return [None] * len(completions)

    rows = [{"prompt": "Beautiful is", "level": 7}] * 4
    with caplog.at_level(logging.WARNING):
        build(reward_funcs=abstains, train_dataset=rows, max_steps=2).train()
    told = [record.message for record in caplog.records if "All reward functions returned None" in record.message]
    assert len(told) == 1, "once a run"
    assert "for the following kwargs:" in told[0]
    assert "'level': 7" in told[0]


def test_no_warning_where_one_function_scores(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    def abstains(completions: Any, **_: Any) -> list[None]:
        return [None] * len(completions)

    with caplog.at_level(logging.WARNING):
        build(reward_funcs=[abstains, "length"]).train()
    assert "All reward functions returned None" not in caplog.text
