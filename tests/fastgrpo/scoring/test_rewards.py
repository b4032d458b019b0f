"""The built-in rewards, naming reward functions and calling them."""

import asyncio
import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.scoring.rewards import (
    reads_golds,
    resolve_reward_functions,
    reward_name,
    score,
)
from fastgrpo.scoring.tagged import tagged_accuracy, tagged_format, token_length
from fastgrpo.types import Completion, Prompt, Rollout


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
    assert tagged_format(prompts=["where?"], completions=[text]) == [reward]
    assert tagged_format(prompts=[user], completions=[chat(text)]) == [reward]


@pytest.mark.parametrize("prompt", ["Assistant: Let me solve this.\n<think>", "…<think>\n"])
def test_in_base_mode_the_prompts_think_tag_belongs_to_the_completion(prompt: str) -> None:
    inside = " a</think> <answer>b</answer>"
    prefilled = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": prompt}]
    assert tagged_format(prompts=[prompt, prompt], completions=[inside, "<think>" + inside]) == [1.0, 0.0]
    assert tagged_format(prompts=[prefilled], completions=[chat(inside)]) == [1.0]
    asked = [{"role": "user", "content": [{"type": "text", "text": "use <think>"}]}]
    assert tagged_format(prompts=[asked], completions=[chat(inside)]) == [0.0]


TEMPLATE_OPENINGS = [
    ("<|im_start|>assistant\n<think>\n", "a</think> <answer>b</answer>"),
    ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<answer>b</answer>"),
    ("<|im_start|>assistant\n", "<think>a</think> <answer>b</answer>"),
]


@pytest.mark.parametrize(("opening", "rest"), TEMPLATE_OPENINGS)
def test_what_a_chat_template_opens_belongs_to_the_completion(opening: str, rest: str) -> None:
    messages = [{"role": "user", "content": "where? Use <think> </think> tags."}]
    rendered = f"<|im_start|>user\nwhere? Use <think> </think> tags.<|im_end|>\n{opening}"
    (prompt, completions) = group(0, [rest, rest + " and more", "<think>" + rest, ""], messages=messages)
    rewards = score([(replace(prompt, text=rendered), completions)], [tagged_format])
    assert rewards[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert tagged_format([rendered], [rest]) == [1.0], "as evaluation asks"


def test_accuracy_reward_wants_the_tag() -> None:
    completions = [
        "a</think><answer>(A)</answer>",
        "a</think><answer>left.</answer>",
        "(A)",
        "it is a left",
        "<answer>right</answer>",
    ]
    rewards = tagged_accuracy(
        prompts=[""] * 5,
        completions=completions,
        solution=["left"] * 5,
        choices=[["left", "right"]] * 5,
        task=["x"] * 5,
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert tagged_accuracy([[]], [chat("<answer>LEFT</answer>")], solution=["left"]) == [1.0]


def test_accuracy_reward_abstains_on_rows_without_a_solution_and_needs_the_column() -> None:
    texts = ["<answer>3</answer>"] * 2
    assert tagged_accuracy(["", ""], texts, solution=[None, "3"], choices=[None, None]) == [None, 1.0]
    with pytest.raises(ValueError, match="`solution` column"):
        tagged_accuracy(["", ""], texts)


@pytest.mark.parametrize("gold", [[3], 3, 3.0, "3", "<answer> 3 </answer>", "$3$", np.int64(3), ["three"]])
def test_golds_in_any_form(gold: Any) -> None:
    texts = ["<answer>3</answer>", "<answer>4</answer>", "3"]
    assert tagged_accuracy([""] * 3, texts, solution=[gold] * 3) == [1.0, 0.0, 0.0]


def test_options_in_any_form() -> None:
    texts = ["<answer>C</answer>", "<answer>three</answer>", "<answer>2</answer>"]
    for choices in ([1, 2, 3, 4], np.arange(1, 5), ("1", 2.0, 3, "4")):
        assert tagged_accuracy([""] * 3, texts, solution=[3] * 3, choices=[choices] * 3) == [1.0, 1.0, 0.0]


def test_a_gold_that_cannot_be_one_is_told_whatever_was_completed() -> None:
    with pytest.raises(ValueError, match=r"solution is \[1, 2\]; wanted one text or number"):
        tagged_accuracy([""], ["no tags"], solution=[[1, 2]])


def test_reads_golds() -> None:
    assert reads_golds([token_length, functools.partial(tagged_accuracy)])
    assert not reads_golds([token_length, tagged_format])


def test_length_reward_counts_tokens() -> None:
    rewards = token_length(["", ""], ["x", "y"], completion_ids=[[1] * 700, []], solution=["", ""])
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
        "prompt_texts": ["prompt 0"] * 2 + ["prompt 1"] * 2,
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
    assert score([], [token_length]).shape == (0, 1)
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
    ([1.0, math.nan, 1.0, 1.0], "'broken' returned nan for completion 1 of row 0: .* --nan_rewards abstain"),
    ([1.0, 1.0, math.inf, 1.0], "'broken' returned inf for completion 0 of row 1: return None to abstain"),
    ([1.0, 1e300, 1.0, 1.0], r"'broken' returned 1e\+300 for completion 1 of row 0"),
    ([1.0, 1.0, 1.0, "good"], "'broken' returned 'good' for completion 1 of row 1: return a number"),
]


@pytest.mark.parametrize(("value", "message"), BROKEN)
def test_score_refuses_what_is_not_a_number_per_completion(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(GROUPS, [token_length, returning(value)])


def test_rewards_that_are_not_finite_may_count_as_abstentions(caplog: pytest.LogCaptureFixture) -> None:
    rewards = score(GROUPS, [returning([1.0, math.nan, -math.inf, 1e300])] * 2, nan_rewards="abstain")
    assert rewards[:, 0].isnan().tolist() == [False, True, True, True]
    assert [record.getMessage().count("'broken' returned numbers") for record in caplog.records] == [1]


def test_score_names_the_function_that_raised() -> None:
    def judge(**_: Any) -> list[float]:
        raise KeyError("missing")

    async def remote(**_: Any) -> list[float]:
        raise TimeoutError("no reply")

    with pytest.raises(ValueError, match="'judge' failed on 4 completions: KeyError: 'missing'") as caught:
        score(GROUPS, [judge])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="'remote' failed on 4 completions: TimeoutError: no reply") as caught:
        score(GROUPS, [token_length, remote])
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_resolve_reward_functions() -> None:
    def mine(**_: Any) -> list[float]:
        return []

    resolved = resolve_reward_functions(["accuracy", "format", "length", "fastgrpo.scoring.tagged:tagged_format", mine])
    assert resolved == [tagged_accuracy, tagged_format, token_length, tagged_format, mine]
    assert resolve_reward_functions(["fastgrpo.scoring.tagged.token_length"]) == [token_length], "as TRL writes it"


UNRESOLVABLE = [
    ("acuracy", "accuracy, format, length.*Did you mean 'accuracy'"),
    ("zzz", "accuracy, format, length"),
    ("no_such_module:f", "cannot be imported"),
    ("fastgrpo.scoring.rewards:no_such", "cannot be imported"),
    ("fastgrpo.scoring.rewards.no_such", "cannot be imported"),
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

    @functools.wraps(token_length)
    def wrapper(**_: Any) -> list[float]:
        return []

    assert reward_name(tagged_accuracy) == "tagged_accuracy"
    assert reward_name(functools.partial(token_length, completion_ids=[])) == "token_length"
    assert reward_name(wrapper) == "token_length"
    assert reward_name(Judge()) == "Judge"
