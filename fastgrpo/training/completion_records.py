"""What the logs keep of each completion. Names that users choose stay apart from ours until they are written."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgrpo.scoring.advantages import ZERO_STD, Advantages
from fastgrpo.scoring.golds import option_texts
from fastgrpo.scoring.reflection import count_reflections
from fastgrpo.scoring.rewards import RewardFunction, reward_name
from fastgrpo.scoring.self_correction import Correction, self_correction
from fastgrpo.types import FinishReason, ScoredRollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletionRecord:
    """One completion and what was made of it."""

    row_id: int
    index: int
    """0..G-1 within its rollout."""
    prompt: str
    completion: str
    finish_reason: FinishReason
    length: int
    """Tokens that the policy wrote, the end token included."""
    prompt_length: int
    """Tokens."""
    advantage: float
    reward: float | None
    """Weighted sum over the reward functions; None where every one abstained."""
    rewards: Mapping[str, float | None]
    """By the name of the reward function; None where it abstained."""
    task: str | None = None
    solution: str | None = None
    thumbnail: bytes | None = None
    """JPEG; on a rollout's first completion alone, since eight copies would be most of a file."""
    zero_std: bool = False
    """Its rollout's rewards do not differ."""
    reflections: int = 0
    """Reflective phrases."""
    has_options: bool = False
    """Its question names the options to choose from, and which of them is right."""
    correction: Correction | None = None
    """How the answer differs from what the reasoning proposed first; None where it does not, or has no options."""
    tool_calls: tuple[int, int] | None = None
    """How many tools it called, and how many of these calls failed; None where there are no tools."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What reward functions logged of it (`log_extra`), by the names they gave."""

    def columns(self) -> dict[str, Any]:
        """The columns of the completions log. Names that users chose stand behind `rewards/` and `extra/`."""
        return {
            "row_id": self.row_id,
            "index": self.index,
            "prompt": self.prompt,
            "completion": self.completion,
            "finish_reason": self.finish_reason,
            "length": self.length,
            "advantage": self.advantage,
            "reward": self.reward,
            **{f"rewards/{name}": value for name, value in self.rewards.items()},
            "correction": self.correction,
            "task": self.task,
            "solution": self.solution,
            "thumbnail": self.thumbnail,
            **{f"extra/{name}": value for name, value in self.extra.items()},
        }


def distinct_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The functions' names, the second of one name called `name_2`; a warning says so."""
    names: list[str] = []
    for function in functions:
        name = reward_name(function)
        candidates = [name, *(f"{name}_{number}" for number in range(2, len(functions) + 1))]
        names.append(next(candidate for candidate in candidates if candidate not in names))
    doubled = [name for name, count in Counter(map(reward_name, functions)).items() if count > 1]
    if doubled:
        logger.warning("Several reward functions are called %s: they are logged as %s.", ", ".join(doubled), names)
    return names


def records_of(
    rollouts: Sequence[ScoredRollout],
    reward_names: Sequence[str],
    advantages: Advantages,
    *,
    thumbnails: bool,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> list[CompletionRecord]:
    """A record per completion, in the order of the rollouts.

    Args:
        reward_names: distinct, one per column of `ScoredRollout.rewards`.
        extra: a value per completion under each name.

    Raises:
        ValueError: a column of `extra` has another length.
    """
    places = [(r, rollout, completion) for r, rollout in enumerate(rollouts) for completion in rollout.completions]
    for name, column in (extra or {}).items():
        if len(column) != len(places):
            raise ValueError(
                f"log_extra({name!r}, …) was given {len(column)} values for {len(places)} completions: give one each."
            )
    totals, values, stds = advantages.rewards.tolist(), advantages.advantages.tolist(), advantages.group_std.tolist()
    records = []
    for n, (r, rollout, completion) in enumerate(places):
        prompt = rollout.prompt
        choices, solution = prompt.columns.get("choices"), _text_or_none(prompt.columns.get("solution"))
        options = None if choices is None or solution is None else option_texts(choices)
        scores = [_none_if_nan(value) for value in rollout.rewards[completion.index].tolist()]
        records.append(
            CompletionRecord(
                row_id=prompt.row_id,
                index=completion.index,
                prompt=prompt.text,
                completion=completion.text,
                finish_reason=completion.finish_reason,
                length=len(completion.token_ids) if completion.own_tokens is None else int(completion.own_tokens.sum()),
                prompt_length=len(prompt.input_ids),
                advantage=values[n],
                reward=_none_if_nan(totals[n]),
                rewards=dict(zip(reward_names, scores, strict=True)),
                task=_text_or_none(prompt.columns.get("task")),
                solution=solution,
                thumbnail=prompt.thumbnail if thumbnails and completion.index == 0 else None,
                zero_std=stds[r] <= ZERO_STD,
                reflections=count_reflections(completion.text),
                has_options=options is not None,
                correction=self_correction(completion.text, options, str(solution)) if options else None,
                tool_calls=completion.tool_calls,
                extra={name: column[n] for name, column in (extra or {}).items()},
            )
        )
    return records


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
