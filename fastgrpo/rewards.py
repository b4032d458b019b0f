"""TRL's reward functions under TRL's names and with TRL's meaning: `from fastgrpo.rewards import accuracy_reward`.

Each takes keyword arguments, one entry per completion in each; completions are texts, or lists of one chat message.
The rewards of answers between `<answer>` tags are in `fastgrpo.scoring.tagged`.
"""

import functools
import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

try:
    import latex2sympy2_extended
    import math_verify
except ImportError:  # a machine that only measures may lack it
    math_verify = None

Completion = str | Sequence[dict[str, Any]]
Reward = Callable[..., list[float | None]]
LogExtra = Callable[[str, list[Any]], None]


class PerGroup(functools.partial[Any]):
    """What `per_group` makes."""


def per_group(function: Callable[..., Any]) -> PerGroup:
    """Marks a reward function to be called on each group (a prompt's completions), in threads, as soon as it is drawn.

    While it waits for an answer, other groups are drawn. It runs several times at once and sees one group: do not mark
    one that compares prompts, or that keeps state without a lock. TRL calls it as any other.
    """
    return PerGroup(function)


PARSING_SECONDS, COMPARING_SECONDS = 10, 5
_THINK = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)


def accuracy_reward(
    completions: Sequence[Completion], solution: Sequence[str], log_extra: LogExtra | None = None, **_: Any
) -> list[float | None]:
    """1 where math-verify finds the completion's LaTeX answer equal to the solution's, else 0.

    The whole completion is read. None where the solution holds nothing that math-verify can read.

    Args:
        solution: gold answers as texts, with LaTeX or a plain number.
        log_extra: takes the columns `solution`, `gold_parsed` and `answer_parsed`.
    """
    return _graded([_text(completion) for completion in completions], solution, log_extra)


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: LogExtra | None = None,
    **_: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the reasoning; 0 where the reasoning does not end.

    Args:
        reasoning_delimiters: texts that end the reasoning; of the first that occurs, the last place counts. Default
            `</think>`.
    """
    delimiters = reasoning_delimiters or ["</think>"]

    def answer(text: str) -> str | None:
        found = next((delimiter for delimiter in delimiters if delimiter in text), None)
        return None if found is None else text.rpartition(found)[2]

    return _graded([answer(_text(completion)) for completion in completions], solution, log_extra)


def think_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 where the completion opens with `<think>`, once, and closes it with `</think>` before it ends; else 0."""
    return [float(_THINK.match(_text(completion)) is not None) for completion in completions]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Reward:
    """A reward function: 0 up to `max_completion_len - soft_punish_cache` tokens, then falling to -1 at the maximum.

    DAPO, arXiv 2503.14476, eq. 13.

    Args:
        max_completion_len, soft_punish_cache: tokens.
    """
    return _named("soft_overlong_punishment_reward", _overlong, max_completion_len, soft_punish_cache)


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Reward:
    """A reward function: `max_penalty` times the share of a completion's n-grams of tokens that repeat others.

    arXiv 2502.03373, appendix C.2. A completion of fewer than `ngram_size` tokens gets 0.

    Raises:
        ValueError: `max_penalty` above 0.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty={max_penalty} should not be positive: it is the reward of pure repetition")
    return _named("repetition_penalty_reward", _repetition, ngram_size, max_penalty)


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Reward:
    """A reward function: `accuracy_reward` scaled by length along a cosine, arXiv 2502.03373, appendix C.1.

    A correct completion gets `max_value_correct` when short, `min_value_correct` at `max_len` tokens and more; a wrong
    one `min_value_wrong` when short, `max_value_wrong` at `max_len`.
    """
    wrong, correct = (min_value_wrong, max_value_wrong), (max_value_correct, min_value_correct)
    return _named("cosine_scaled_reward", _cosine, max_len, wrong, correct)


def _named(name: str, function: Callable[..., Any], *arguments: Any) -> Reward:
    """A partial function, which other processes can be sent, with the name it is logged by."""
    reward = functools.partial(function, *arguments)
    reward.__name__ = name  # type: ignore[attr-defined]
    return reward


def _overlong(longest: int, soft: int, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    def punishment(length: int) -> float:
        if length <= longest - soft:
            return 0.0
        return (longest - soft - length) / soft if length <= longest else -1.0

    return [punishment(len(ids)) for ids in completion_ids]


def _repetition(size: int, penalty: float, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    def share(ids: Sequence[int]) -> float:
        grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return [share(ids) * penalty if share(ids) else 0.0 for ids in completion_ids]


def _cosine(
    longest: int,
    wrong: tuple[float, float],
    correct: tuple[float, float],
    completions: Sequence[Completion],
    solution: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    **_: Any,
) -> list[float | None]:
    def scaled(is_correct: float | None, length: int) -> float | None:
        if is_correct is None:
            return None
        short, long = correct if is_correct else wrong
        return long + 0.5 * (short - long) * (1 + math.cos(min(length / longest, 1.0) * math.pi))

    verdicts = accuracy_reward(completions, solution)
    return [scaled(verdict, len(ids)) for verdict, ids in zip(verdicts, completion_ids, strict=True)]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _graded(answers: Sequence[str | None], solutions: Sequence[str], log_extra: LogExtra | None) -> list[float | None]:
    """Verdicts on answers, of which None stands for reasoning without an end."""
    if math_verify is None:
        raise ImportError("this reward compares answers with math-verify: pip install math-verify")
    # A box counts first; a number without LaTeX around it is no answer.
    wanted = math_verify.LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=latex2sympy2_extended.NormalizationConfig(units=True),
        try_extract_without_anchor=False,
    )
    # math-verify keeps time by a signal, which only the main thread may set.
    is_main = threading.current_thread() is threading.main_thread()
    parsing, comparing = (PARSING_SECONDS, COMPARING_SECONDS) if is_main else (None, None)
    if not is_main:
        for name in ("math_verify.parser", "math_verify.grader"):  # they warn of it at every call
            logging.getLogger(name).setLevel(logging.ERROR)
    verdicts: list[float | None] = []
    golds, found = [], []
    for answer, solution in zip(answers, solutions, strict=True):
        if answer is None:
            verdict, gold, read = 0.0, "[incomplete reasoning]", "[incomplete reasoning]"
        elif not (parsed := math_verify.parse(solution, parsing_timeout=parsing)):
            verdict, gold, read = None, "[unparseable]", "[skipped]"
        else:
            own = math_verify.parse(answer, [wanted], extraction_mode="first_match", parsing_timeout=parsing)
            verdict = float(math_verify.verify(parsed, own, timeout_seconds=comparing))
            gold, read = str(parsed), str(own) if own else "[unparseable]"
        verdicts.append(verdict)
        golds.append(gold)
        found.append(read)
    if log_extra is not None:
        for name, column in (("solution", list(solutions)), ("gold_parsed", golds), ("answer_parsed", found)):
            log_extra(name, column)
    return verdicts
