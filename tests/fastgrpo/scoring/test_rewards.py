"""Answers, the built-in rewards, naming reward functions and calling them."""

import asyncio
import functools
import logging
import math
import threading
from typing import Any

import pytest
import torch

from fastgrpo.scoring.rewards import (
    accuracy_reward,
    answers_match,
    format_reward,
    length_reward,
    parse_answer,
    resolve_reward_functions,
    reward_name,
    score,
)
from fastgrpo.types import Completion, Prompt, Rollout

PARSED = [
    ("<answer>left</answer>", "left"),
    ("<think>x</think> <answer> (A) </answer>\n", "(A)"),
    ("<answer>\nleft\n</answer>", "left"),
    ("<answer>two\nlines</answer>", "two\nlines"),
    ("so the answer is left", None),
    ("<answer></answer>", None),
    ("<answer> \n </answer>", None),
    ("<answer>left", None),
    ("left</answer>", None),
    ("</answer>left<answer>", None),
    ("<answer>left</answer><answer>right</answer>", None),
    ("<answer>left</answer><answer>left</answer>", None),
    ("<answer><answer>left</answer></answer>", None),
    ("<answer>left</answer> or <answer>", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), PARSED)
def test_parse_answer(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer


SAME_TEXT = [
    ("yes", "yes"),
    ("yes.", "yes"),
    ("Yes!", "yes"),
    ("YES", "yes"),
    ("  yes \n", "yes"),
    ("yes", "Yes."),
    ('"yes"', "yes"),
    ("“yes”", "yes"),
    ("**left**", "left"),
    ("`left`.", "left"),
    ("the left", "left"),
    ("left", "the left"),
    ("a dog", "the dog"),
    ("an apple", "Apple"),
    ("moved  to\nthe left", "moved to the left"),
    ("man’s hat", "man's hat"),
    ("ｌｅｆｔ", "left"),
    ("Größe", "GRÖSSE"),
    ("\\text{left}", "left"),
    ("\\boxed{left}", "left"),
    ("$\\boxed{\\text{left}}$", "left"),
]
DIFFERENT_TEXT = [
    ("yes and no", "yes"),
    ("yesterday", "yes"),
    ("not left", "left"),
    ("left or right", "left"),
    ("the answer is left", "left"),
    ("a", "left"),
    ("the", "left"),
    ("left", "right"),
    ("", "left"),
    ("", ""),
    (".", ""),
    ("   ", "."),
    ("no", "yes"),
]


@pytest.mark.parametrize(("answer", "solution"), SAME_TEXT)
def test_texts_that_match(answer: str, solution: str) -> None:
    assert answers_match(answer, solution)
    assert answers_match(answer, solution, ["something else", solution])


@pytest.mark.parametrize(("answer", "solution"), DIFFERENT_TEXT)
def test_texts_that_do_not_match(answer: str, solution: str) -> None:
    assert not answers_match(answer, solution)
    assert not answers_match(answer, solution, [solution or "left", "something else"]) or answer == "a"


LETTERS_OF_A = ["(A)", "(a)", "A", "a", "A.", "a.", "A)", "a)", "(A).", "A:", "[A]", " A ", "option A", "Option (A)"]
LETTERS_OF_A += ["Choice A.", "answer: A", "**A**", "Ａ", "\\boxed{A}", "\\text{(A)}", '"A"']


@pytest.mark.parametrize("answer", LETTERS_OF_A)
@pytest.mark.parametrize("solution", ["(A)", "A", "chair"])
def test_option_letters_in_any_usual_form(answer: str, solution: str) -> None:
    choices = ["chair", "table", "lamp"]
    assert answers_match(answer, solution, choices)
    assert not answers_match(answer, "(B)", choices)
    assert not answers_match(answer, "table", choices)
    if solution != "chair":
        assert answers_match(answer, solution)
        assert not answers_match(answer, "(B)")


CHOICES = ["chair", "table", "a big lamp"]
WITH_CHOICES = [
    ("chair", "(A)", True),
    ("The chair.", "(A)", True),
    ("(A) chair", "(A)", True),
    ("A. chair", "(A)", True),
    ("A: the chair", "chair", True),
    ("Option A: chair", "chair", True),
    ("chair", "(A) chair", True),
    ("big lamp", "(C)", True),
    ("(C) a big lamp", "C", True),
    ("c) big lamp", "C", True),
    ("(A) table", "(A)", False),
    ("(A) table", "(B)", False),
    ("A chair", "(B)", False),
    ("a table", "(A)", False),
    ("a b", "(B)", False),
    ("a or b", "(A)", False),
    ("A, B", "(A)", False),
    ("AB", "(A)", False),
    ("(A)(B)", "(A)", False),
    ("It is a chair", "(A)", False),
    ("I think a", "(A)", False),
    ("(F)", "(A)", False),
    ("D", "(A)", False),
    ("1", "(A)", False),
]


@pytest.mark.parametrize(("answer", "solution", "same"), WITH_CHOICES)
def test_letters_and_option_texts_stand_for_each_other(answer: str, solution: str, same: bool) -> None:
    assert answers_match(answer, solution, CHOICES) is same


def test_options_that_are_numbers() -> None:
    choices = ["3", "2", "0.5", "1,000"]
    assert answers_match("3", "(A)", choices)
    assert answers_match("three", "(A)", choices)
    assert answers_match("3.0", "A", choices)
    assert answers_match("B", "2", choices)
    assert answers_match("1/2", "(C)", choices)
    assert answers_match("1000", "(D)", choices)
    assert not answers_match("2", "(A)", choices)
    assert not answers_match("(B)", "(C)", choices)


def test_options_that_are_letters_are_read_as_texts_first() -> None:
    assert answers_match("B", "(A)", ["B", "C"])
    assert answers_match("(A)", "B", ["B", "C"])


def test_without_choices_a_bracketed_letter_before_a_text_counts() -> None:
    assert answers_match("(A) left", "(A)")
    assert not answers_match("(B) left", "(A)")
    assert not answers_match("x: 5", "x: 3")
    assert not answers_match("a left", "(A)")


SAME_NUMBER = [
    ("3", "3.0"),
    ("3.", "3"),
    ("three", "3"),
    ("Twenty", "20"),
    ("zero", "0"),
    ("-3", "−3"),
    ("+3", "3"),
    (".5", "0.5"),
    ("1,000", "1000"),
    ("12,345,678.50", "12345678.5"),
    ("1/2", "0.5"),
    ("2 / 4", "1/2"),
    ("-1/2", "-0.5"),
    ("50%", "0.5"),
    ("50\\%", "0.5"),
    ("$3$", "3"),
    ("\\boxed{3}", "3"),
    ("\\frac{1}{2}", "0.5"),
    ("$\\frac12$", "1/2"),
    ("\\sqrt{4}", "2"),
    ("2^3", "8"),
    ("2\\pi", "\\pi\\cdot 2"),
    ("1\\frac{1}{2}", "1.5"),
    ("the 3", "3"),
    ("３", "3"),
    ("(3)", "3"),
]
DIFFERENT_NUMBER = [
    ("3", "4"),
    ("3", "-3"),
    ("3", "30"),
    ("3 4", "3"),
    ("3 4", "34"),
    ("3 4", "12"),
    ("3 or 4", "3"),
    ("1,5", "15"),
    ("1,00", "100"),
    ("3²", "32"),
    ("1½", "5.5"),
    ("1/0", "0"),
    ("1/0", "1"),
    ("0.333", "1/3"),
    ("2+", "2"),
    ("three dogs", "3"),
    ("twenty one", "21"),
    ("-", "0"),
    ("%", "0"),
    ("\\frac{1}{0}", "1"),
    ("nan", "3"),
    ("inf", "3"),
    ("1e3", "1000"),
]


@pytest.mark.parametrize(("answer", "solution"), SAME_NUMBER)
def test_numbers_match_by_value(answer: str, solution: str) -> None:
    assert answers_match(answer, solution)
    assert answers_match(solution, answer)


@pytest.mark.parametrize(("answer", "solution"), DIFFERENT_NUMBER)
def test_numbers_that_differ(answer: str, solution: str) -> None:
    assert not answers_match(answer, solution)


HOSTILE = [
    "9^9^9^9^9",
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "(9^9)^9^9",
    "9^{999999999}",
    "9^999999999",
    "9^9 999999999",
    "9^{9}{999999999}",
    "9^9\\left999999999",
    "9^{-9}99999999",
    "99999999!",
    "9" * 100_000,
    "1/" + "9" * 100_000,
    "1e999999999",
    "(" * 5_000 + "3" + ")" * 5_000,
    "\\text{" * 1_000 + "3" + "}" * 1_000,
    "\\sqrt{" * 6 + "2",
    "\x00\ud800",
    "<answer>" * 1_000,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_end_quickly_without_credit(answer: str) -> None:
    for solution in ("7", "\\frac{1}{2}", "(A)", "left"):
        assert not answers_match(answer, solution, ["chair", "table"])
    assert parse_answer(answer) is None


def test_matching_works_off_the_main_thread_and_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lambda: results.append(answers_match("\\frac{1}{2}", "0.5")))
        thread.start()
        thread.join()
    assert results == [True]
    assert not caplog.records


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


WELL_FORMED = [
    "<think>a</think><answer>b</answer>",
    "<think>a</think> <answer>b</answer>",
    "<think>\na\n\nb</think>\n\n<answer>\nc\n</answer>",
    "  <think>a</think><answer>b</answer>\n",
    "<think></think><answer></answer>",
    "<think>a < b</think><answer>b</answer>",
]
ILL_FORMED = [
    "",
    "b",
    "<think>a</think>",
    "<answer>b</answer>",
    "<think>a</think>b",
    "<think>a</think><answer>b",
    "<think>a</think><answer>b</answer> and more",
    "well, <think>a</think><answer>b</answer>",
    "<think>a</think> so <answer>b</answer>",
    "<think>a</think><answer>b</answer><answer>b</answer>",
    "<think>a</think><think>b</think><answer>c</answer>",
    "<think>a<think>b</think><answer>c</answer>",
    "<think>a</think></think><answer>c</answer>",
    "<think>a</think><answer><answer>b</answer></answer>",
    "<think>a<answer>b</answer></think>",
    "<answer>b</answer><think>a</think>",
    "<THINK>a</THINK><ANSWER>b</ANSWER>",
]


@pytest.mark.parametrize(("text", "reward"), [(t, 1.0) for t in WELL_FORMED] + [(t, 0.0) for t in ILL_FORMED])
def test_format_reward(text: str, reward: float) -> None:
    user = [{"role": "user", "content": "where?"}]
    assert format_reward(prompts=["where?"], completions=[text]) == [reward]
    assert format_reward(prompts=[user], completions=[chat(text)]) == [reward]


@pytest.mark.parametrize("prompt", ["Assistant: Let me solve this.\n<think>", "…<think>\n"])
def test_in_base_mode_the_prompts_think_tag_belongs_to_the_completion(prompt: str) -> None:
    inside = " a</think> <answer>b</answer>"
    prefilled = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": prompt}]
    assert format_reward(prompts=[prompt, prompt], completions=[inside, "<think>" + inside]) == [1.0, 0.0]
    assert format_reward(prompts=[prefilled], completions=[chat(inside)]) == [1.0]
    asked = [{"role": "user", "content": [{"type": "text", "text": "use <think>"}]}]
    assert format_reward(prompts=[asked], completions=[chat(inside)]) == [0.0]


def test_accuracy_reward_wants_the_tag() -> None:
    completions = [
        "a</think><answer>(A)</answer>",
        "a</think><answer>left.</answer>",
        "(A)",
        "it is a left",
        "<answer>right</answer>",
    ]
    rewards = accuracy_reward(
        prompts=[""] * 5,
        completions=completions,
        solution=["left"] * 5,
        choices=[["left", "right"]] * 5,
        task=["x"] * 5,
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert accuracy_reward([[]], [chat("<answer>LEFT</answer>")], solution=["left"]) == [1.0]


def test_accuracy_reward_abstains_on_rows_without_a_solution_and_needs_the_column() -> None:
    texts = ["<answer>3</answer>"] * 2
    assert accuracy_reward(["", ""], texts, solution=[None, "3"], choices=[None, None]) == [None, 1.0]
    with pytest.raises(ValueError, match="`solution` column"):
        accuracy_reward(["", ""], texts)


def test_length_reward_counts_tokens() -> None:
    rewards = length_reward(["", ""], ["x", "y"], completion_ids=[[1] * 700, []], solution=["", ""])
    assert rewards == pytest.approx([0.7, 0.0])


def group(
    row_id: int, texts: list[str], columns: dict[str, Any] | None = None, messages: list[dict[str, Any]] | None = None
) -> Rollout:
    prompt = Prompt(
        row_id=row_id,
        input_ids=torch.arange(3),
        position_ids=torch.zeros(3, 3, dtype=torch.long),
        pixel_values=None,
        image_grid_thw=None,
        text=f"prompt {row_id}",
        messages=messages,
        columns=columns or {},
    )
    return prompt, tuple(
        Completion(row_id, i, torch.arange(len(text)), text, "stop", torch.zeros(len(text)), torch.zeros(len(text)))
        for i, text in enumerate(texts)
    )


GROUPS = [
    group(0, ["ab", "c"], {"solution": "c", "task": "count"}),
    group(1, ["def", ""], {"solution": "x", "level": 2, "prompts": "reserved", "log_metric": "reserved"}),
]


def test_score_passes_what_trl_passes() -> None:
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float]:
        seen.update(arguments)
        arguments["log_extra"]("column", ["a"])
        arguments["log_metric"]("name", 1.0)
        return [1, True, 0.25, torch.tensor(2.0)]  # type: ignore[list-item]

    rewards = score(GROUPS, [spy], trainer_state="state")
    assert torch.equal(rewards, torch.tensor([[1.0], [1.0], [0.25], [2.0]]))
    assert rewards.dtype == torch.float32
    assert seen.pop("log_extra")
    assert seen.pop("log_metric")
    assert seen == {
        "prompts": ["prompt 0"] * 2 + ["prompt 1"] * 2,
        "completions": ["ab", "c", "def", ""],
        "completion_ids": [[0, 1], [0], [0, 1, 2], []],
        "solution": ["c", "c", "x", "x"],
        "task": ["count", "count", None, None],
        "level": [None, None, 2, 2],
        "trainer_state": "state",
    }


def test_score_passes_messages_in_chat_mode_and_the_callers_loggers() -> None:
    messages = [{"role": "user", "content": "where?"}]
    calls: list[Any] = []

    def spy(prompts: Any, completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[None]:
        assert prompts == [messages]
        assert completions == [[{"role": "assistant", "content": "left"}]]
        log_metric("m", 1.0)
        log_extra("e", ["x"])
        return [None]

    rewards = score(
        [group(0, ["left"], messages=messages)],
        [spy],
        log_extra=lambda *a: calls.append(a),
        log_metric=lambda *a: calls.append(a),
    )
    assert rewards.isnan().all()
    assert calls == [("m", 1.0), ("e", ["x"])]


def test_score_joins_synchronous_and_asynchronous_functions_in_order() -> None:
    together = []

    async def slow(completions: list[str], **_: Any) -> list[float]:
        together.append("slow starts")
        await asyncio.sleep(0)
        together.append("slow ends")
        return [1.0] * len(completions)

    async def other(completions: list[str], **_: Any) -> list[float | None]:
        together.append("other starts")
        await asyncio.sleep(0)
        return [None] * len(completions)

    def plain(completions: list[str], **_: Any) -> Any:
        return torch.full((len(completions),), 2.0)

    for _ in range(2):  # the loop outlives a call
        rewards = score(GROUPS, [slow, plain, other])
        assert rewards[:, 0].tolist() == [1.0] * 4
        assert rewards[:, 1].tolist() == [2.0] * 4
        assert rewards[:, 2].isnan().all()
    assert together.index("other starts") < together.index("slow ends")


def test_score_works_inside_a_running_loop() -> None:
    async def one(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    async def notebook() -> torch.Tensor:
        return score(GROUPS, [one])

    assert asyncio.run(notebook()).sum() == 4


def test_score_of_nothing() -> None:
    assert score([], [length_reward]).shape == (0, 1)
    assert score(GROUPS, []).shape == (4, 0)


def returning(value: Any) -> Any:
    def broken(**_: Any) -> Any:
        return value

    return broken


BROKEN = [
    ([1.0], "'broken' returned 1 rewards for 4 completions"),
    ([1.0] * 5, "'broken' returned 5 rewards for 4 completions"),
    (1.0, "'broken' returned float: return a list of 4"),
    (None, "'broken' returned NoneType"),
    ("1234", "'broken' returned str"),
    ([1.0, math.nan, 1.0, 1.0], "'broken' returned nan for completion 1: return None to abstain"),
    ([1.0, 1.0, math.inf, 1.0], "'broken' returned inf for completion 2: return None to abstain"),
    ([1.0, 1.0, 1.0, "good"], "'broken' returned 'good' for completion 3: return a number"),
]


@pytest.mark.parametrize(("value", "message"), BROKEN)
def test_score_refuses_what_is_not_a_number_per_completion(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(GROUPS, [length_reward, returning(value)])


def test_score_names_the_function_that_raised() -> None:
    def judge(**_: Any) -> list[float]:
        raise KeyError("missing")

    async def remote(**_: Any) -> list[float]:
        raise TimeoutError("no reply")

    with pytest.raises(ValueError, match="'judge' failed on 4 completions: KeyError: 'missing'") as caught:
        score(GROUPS, [judge])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="'remote' failed on 4 completions: TimeoutError: no reply") as caught:
        score(GROUPS, [length_reward, remote])
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_resolve_reward_functions() -> None:
    def mine(**_: Any) -> list[float]:
        return []

    resolved = resolve_reward_functions(
        ["accuracy", "format", "length", "fastgrpo.scoring.rewards:format_reward", mine]
    )
    assert resolved == [accuracy_reward, format_reward, length_reward, format_reward, mine]


UNRESOLVABLE = [
    ("acuracy", "accuracy, format, length.*Did you mean 'accuracy'"),
    ("zzz", "accuracy, format, length"),
    ("no_such_module:f", "cannot be imported"),
    ("fastgrpo.scoring.rewards:no_such", "cannot be imported"),
    (":f", "cannot be imported"),
    ("fastgrpo.scoring.rewards:REWARD_FUNCTIONS", "is a dict, not a function"),
]


@pytest.mark.parametrize(("spec", "message"), UNRESOLVABLE)
def test_unknown_reward_functions_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_reward_functions([spec])


def test_reward_name() -> None:
    class Judge:
        def __call__(self, **_: Any) -> list[float]:
            return []

    @functools.wraps(length_reward)
    def wrapper(**_: Any) -> list[float]:
        return []

    assert reward_name(accuracy_reward) == "accuracy_reward"
    assert reward_name(functools.partial(length_reward, completion_ids=[])) == "length_reward"
    assert reward_name(wrapper) == "length_reward"
    assert reward_name(Judge()) == "Judge"
