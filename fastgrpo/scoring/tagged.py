"""The rewards of arXiv 2503.05132: answers between `<answer>` tags behind thoughts between `<think>` tags."""

import re
from collections.abc import Sequence
from typing import Any

from fastgrpo.scoring.answers import answers_match, parse_answer
from fastgrpo.scoring.golds import gold_text, option_texts

_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def tagged_accuracy(
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


def tagged_format(
    prompts: Sequence[Any], completions: Sequence[Any], prompt_texts: Sequence[str] | None = None, **_: Any
) -> list[float | None]:
    """1 where the completion is `<think>…</think> <answer>…</answer>` and nothing else, each tag once; else 0.

    White space around is allowed. What the prompt opens counts as the completion's: a `<think>` at its end (base mode,
    templates of reasoning models), or an empty `<think></think>` (such templates with thinking off).
    """
    opened = prompts if prompt_texts is None else prompt_texts
    texts = [_opening(prompt) + _text(completion) for prompt, completion in zip(opened, completions, strict=True)]
    return [float(_FORM.fullmatch(text) is not None and all(text.count(t) == 1 for t in _TAGS)) for text in texts]


def token_length(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
) -> list[float | None]:
    """0.001 per completion token: a control, which rewards length alone."""
    return [0.001 * len(ids) for ids in completion_ids]


def _text(completion: str | Sequence[dict[str, Any]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _opening(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The tags with which a prompt, or the start of the assistant's turn in it, opens the completion."""
    if not isinstance(prompt, str):
        last = prompt[-1] if prompt else {}
        prompt = last["content"] if last.get("role") == "assistant" and isinstance(last["content"], str) else ""
    found = _OPENING.search(prompt)
    return found[0] if found else ""
