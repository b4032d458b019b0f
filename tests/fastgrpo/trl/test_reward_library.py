"""`fastgrpo.rewards`: TRL's reward functions, by values worked out by hand."""

import inspect
import pickle
import threading
from typing import Any

import pytest

from fastgrpo import rewards
from fastgrpo.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from fastgrpo.scoring.rewards import REWARD_FUNCTIONS, resolve_reward_functions, reward_name


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        (r"So it is \boxed{\frac{1}{3}}.", r"\frac{1}{3}", 1.0),
        (r"So it is \boxed{\frac{1}{2}}.", r"\frac{1}{3}", 0.0),
        (r"The answer is $0.5$", r"$\frac{1}{2}$", 1.0),
        (r"$0.5$ is it", r"$\frac{1}{2}$", 0.0),
        (r"\boxed{63}", "63", 1.0),
        ("it is 63", "63", 0.0),
        ("", "63", 0.0),
        (r"\boxed{4} or rather $5$", "$4$", 1.0),
    ],
)
def test_accuracy_reads_the_whole_text_by_math_verify(text: str, gold: str, reward: float) -> None:
    assert accuracy_reward([chat(text)], [gold]) == [reward]
    assert accuracy_reward([text], [gold]) == [reward], "a text is read like a conversation"


def test_accuracy_abstains_where_the_gold_cannot_be_read() -> None:
    assert accuracy_reward([chat(r"\boxed{1}"), chat(r"\boxed{1}")], ["", "1"]) == [None, 1.0]


def test_accuracy_logs_what_it_read() -> None:
    columns: dict[str, Any] = {}
    accuracy_reward([chat(r"\boxed{2}"), chat("two")], ["2", "2"], log_extra=columns.__setitem__)
    assert columns["solution"] == ["2", "2"]
    assert "2" in columns["gold_parsed"][0]
    assert columns["answer_parsed"][1] == "[unparseable]"


def test_accuracy_works_off_the_main_thread() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(accuracy_reward([r"\boxed{2}"], ["2"])))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"<think> \boxed{1} </think> it is \boxed{2}", 1.0),
        (r"<think> \boxed{2} </think> it is \boxed{3}", 0.0),
        (r"<think> \boxed{2} and no end", 0.0),
        (r"a</think>b</think>\boxed{2}", 1.0),
    ],
)
def test_reasoning_accuracy_reads_what_follows_the_reasoning(text: str, reward: float) -> None:
    assert reasoning_accuracy_reward([chat(text)], ["2"]) == [reward]


def test_the_end_of_the_reasoning_may_be_another_text() -> None:
    given = [chat(r"<r>\boxed{1}</r>\boxed{2}")]
    assert reasoning_accuracy_reward(given, ["2"], reasoning_delimiters=["</think>", "</r>"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nwhy\n</think>\nso", 1.0),
        ("<think></think>", 1.0),
        ("<think>why so", 0.0),
        ("so <think>why</think>", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("why</think>so", 0.0),
    ],
)
def test_think_format(text: str, reward: float) -> None:
    assert think_format_reward([chat(text)]) == [reward]


@pytest.mark.parametrize(("length", "reward"), [(10, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0)])
def test_soft_overlong_punishment(length: int, reward: float) -> None:
    assert get_soft_overlong_punishment(100, 20)(completion_ids=[[1] * length]) == [reward]


def test_repetition_penalty_counts_repeated_ngrams() -> None:
    reward = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert reward([[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]]) == [0.0, -0.75, 0.0]
    with pytest.raises(ValueError, match="max_penalty"):
        get_repetition_penalty_reward(max_penalty=0.5)


def test_cosine_scaling_favours_short_correct_and_long_wrong_answers() -> None:
    reward = get_cosine_scaled_reward(max_len=100)
    right, wrong = chat(r"\boxed{1}"), chat(r"\boxed{2}")
    lengths = [0, 50, 100, 300]
    ids = [[1] * length for length in lengths]
    assert reward([right] * 4, ["1"] * 4, ids) == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert reward([wrong] * 4, ["1"] * 4, ids) == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert reward([right], [""], [[1]]) == [None]


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"])
def test_trls_names_name_trls_rewards(name: str) -> None:
    assert resolve_reward_functions([name]) == [getattr(rewards, name)]


def test_trls_name_of_the_overlong_punishment_has_its_programs_settings() -> None:
    (reward,) = resolve_reward_functions(["get_soft_overlong_punishment"])
    assert reward(completion_ids=[[1] * 1024, [1] * 1152, [1] * 1300]) == [0.0, -0.5, -1.0]
    assert reward_name(reward) == "soft_overlong_punishment_reward"


def test_short_names_are_those_of_the_tagged_rewards() -> None:
    for short, name in (("accuracy", "tagged_accuracy"), ("format", "tagged_format"), ("length", "token_length")):
        assert REWARD_FUNCTIONS[short] is REWARD_FUNCTIONS[name]
        assert reward_name(REWARD_FUNCTIONS[short]) == name


def test_made_rewards_can_be_sent_to_another_process() -> None:
    reward = pickle.loads(pickle.dumps(get_soft_overlong_punishment(100, 20)))  # our own bytes
    assert reward(completion_ids=[[1] * 90]) == [-0.5]
    assert reward_name(reward) == "soft_overlong_punishment_reward"


def test_rewards_take_arguments_they_do_not_know() -> None:
    for function in (accuracy_reward, reasoning_accuracy_reward, think_format_reward):
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds
