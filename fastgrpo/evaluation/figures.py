"""The figures of an evaluation: what one answer counts for, their names, and how `evals/{name}.json` holds them.

Two graders, never mixed. `accuracy` reads the option that a free-text answer settles on (`scoring/readings.py`);
`accuracy_strict` is what the reward would give (`scoring/answers.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from fastgrpo.scoring.answers import answers_match, parse_answer
from fastgrpo.scoring.golds import gold_text, option_texts
from fastgrpo.scoring.readings import read_option
from fastgrpo.scoring.tagged import is_correct, tagged_format
from fastgrpo.types import SkippedRow


class Outcome(NamedTuple):
    """What one answer counts for."""

    answer: str | None
    """What stands in its tags."""
    reading: str | None
    """The letter of the option read in it; without options the strict answer; None where there is nothing to read."""
    answered: bool
    """In the form `<think>…</think> <answer>…</answer>`."""
    correct: bool
    """What was read is right."""
    correct_strict: bool

    @classmethod
    def of(cls, prompt: str, completion: str, solution: Any, choices: Any = None) -> "Outcome":
        """
        Args:
            prompt: as the model reads it; it may open the `<think>`.
            solution, choices: the row's, in any form that `golds` reads.

        Raises:
            RowError: a gold answer or options that cannot be read.
        """
        answer = parse_answer(completion)
        strict = completion.strip() if answer is None else answer
        correct_strict = is_correct(strict, solution, choices)
        options = None if choices is None else option_texts(choices)
        reading = read_option(completion, options) if options else strict or None
        read_right = correct_strict
        if options:
            read_right = reading is not None and answers_match(f"({reading})", gold_text(solution), options)
        answered = tagged_format([prompt], [completion])[0] == 1.0
        return cls(answer, reading, answered, read_right, correct_strict)


@dataclass(frozen=True)
class TaskScore:
    """Figures over a set of questions; rates are fractions, None where not measured or nothing to divide by."""

    count: int | None = None
    accuracy: float | None = None
    """Right as read ÷ all."""
    accuracy_strict: float | None = None
    """Right by the reward's grader ÷ all; an answer without tags counts when it stands alone as an option."""
    unreadable_rate: float | None = None
    """Share in which no option could be read."""
    answered_rate: float | None = None
    """Share answered in the form."""
    answered_accuracy: float | None = None
    """Right by the reward's grader ÷ answered in the form."""
    chance: float | None = None
    """Accuracy of guessing evenly among each question's options; None where no question has options."""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "TaskScore":
        """Of questions with the fields of `Outcome`, and `choices`, how many options each has."""
        answered = [record["correct_strict"] for record in records if record["answered"]]
        return cls(
            count=len(records),
            accuracy=mean([record["correct"] for record in records]),
            accuracy_strict=mean([record["correct_strict"] for record in records]),
            unreadable_rate=mean([record["reading"] is None for record in records]),
            answered_rate=len(answered) / max(len(records), 1),
            answered_accuracy=mean(answered) if answered else None,
            chance=chance_of([record["choices"] for record in records]),
        )

    @classmethod
    def read(cls, content: object) -> "TaskScore":
        """From a file's mapping; what is missing or no number is None."""
        found: dict[str, Any] = {f.name: number(mapping(content).get(f.name)) for f in fields(cls)}
        if "accuracy_strict" not in mapping(content):  # a file from before answers were read
            found |= {"accuracy": None, "accuracy_strict": found["accuracy"]}
        # Files from before `chance` could be unknown hold a zero where no question had options.
        return cls(**found | {"count": integer(found["count"]), "chance": found["chance"] or None})


class PassAtK(NamedTuple):
    """Questions that at least one of k sampled responses answers correctly in the form."""

    k: int
    value: float
    """Their share."""
    chance: float | None = None
    """The share that k even guesses among each question's options would get: the mean of 1 − (1 − 1/options)^k."""


@dataclass(frozen=True)
class Evaluation:
    """A model's score on a data set, and the responses behind it where it was just made."""

    total: TaskScore
    by_task: dict[str, TaskScore] = field(default_factory=dict)
    mean_length: float | None = None
    """Tokens per response."""
    reflection_rate: float | None = None
    """Share of responses with a reflective phrase."""
    shuffled: TaskScore | None = None
    """The same questions about pictures of other questions."""
    pass_at_k: PassAtK | None = None
    skipped: tuple[SkippedRow, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    """One per question."""
    name: str = ""
    step: int | None = None
    """Optimizer steps that the model was trained."""
    dataset: str | None = None

    @property
    def answered_accuracy_shuffled_images(self) -> float | None:
        """What is left of the answered accuracy about the wrong pictures."""
        return None if self.shuffled is None else self.shuffled.answered_accuracy

    def figure(self, name: str) -> float | None:
        """A figure over all questions, by its name."""
        found: float | None = getattr(self.total if hasattr(self.total, name) else self, name)
        return found

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "name": self.name,
            "step": self.step,
            "dataset": self.dataset,
            "num_questions": self.total.count,
            "skipped": [asdict(row) for row in self.skipped],
            **asdict(self.total),
            "accuracy_by_task": {task: asdict(score) for task, score in self.by_task.items()},
            "mean_length": self.mean_length,
            "reflection_rate": self.reflection_rate,
            "pass_at_k": None if self.pass_at_k is None else self.pass_at_k._asdict(),
            "answered_accuracy_shuffled_images": self.answered_accuracy_shuffled_images,
            "shuffled": None if self.shuffled is None else asdict(self.shuffled),
        }

    @classmethod
    def read(cls, name: str, content: Mapping[str, Any]) -> "Evaluation":
        """From what a file holds, without its responses and skipped rows; what is missing or broken is None."""
        pass_at_k = mapping(content.get("pass_at_k"))
        k, value = integer(pass_at_k.get("k")), number(pass_at_k.get("value"))
        shuffled = mapping(content.get("shuffled")) or {
            "answered_accuracy": content.get("answered_accuracy_shuffled_images")
        }
        return cls(
            total=TaskScore.read({"count": content.get("num_questions"), **content}),
            by_task={str(task): TaskScore.read(row) for task, row in mapping(content.get("accuracy_by_task")).items()},
            mean_length=number(content.get("mean_length")),
            reflection_rate=number(content.get("reflection_rate")),
            shuffled=TaskScore.read(shuffled),
            pass_at_k=None if k is None or value is None else PassAtK(k, value, number(pass_at_k.get("chance"))),
            name=name,
            step=integer(content.get("step")),
            dataset=None if content.get("dataset") is None else str(content["dataset"]),
        )


def chance_of(options: Sequence[int], tries: int = 1) -> float | None:
    """Share of questions that even guesses get right in `tries`; a guess at a question with 0 options is wrong."""
    return mean([1 - (1 - 1 / n) ** tries if n else 0.0 for n in options]) if any(options) else None


def mean(values: Sequence[float]) -> float:
    """Of no values it is 0."""
    return sum(values) / len(values) if values else 0.0


def number(value: object) -> float | None:
    """A finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def integer(value: object) -> int | None:
    """A finite number, rounded; None for anything else."""
    as_float = number(value)
    return None if as_float is None else round(as_float)


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping as it is; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}
