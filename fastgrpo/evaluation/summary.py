"""The figures a run is told by: their names, and how they are written to and read from summary.json."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastgrpo.evaluation.figures import Evaluation, TaskScore, integer, mapping, number

COMPARED = (
    *("accuracy", "accuracy_strict", "unreadable_rate", "answered_rate", "answered_accuracy"),
    *("mean_length", "reflection_rate"),
)
"""Figures of evaluations that a summary has as `{name}_before` and `{name}_after`."""
WHOLE = ("num_questions", "steps", "seed")


@dataclass(frozen=True)
class TaskChange:
    """One question type before and after training; fractions 0..1."""

    before: float | None = None
    after: float | None = None
    chance: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class RunSummary:
    """Fractions 0..1 unless said otherwise; None where not measured."""

    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_strict_before: float | None = None
    accuracy_strict_after: float | None = None
    unreadable_rate_before: float | None = None
    unreadable_rate_after: float | None = None
    answered_rate_before: float | None = None
    answered_rate_after: float | None = None
    answered_accuracy_before: float | None = None
    answered_accuracy_after: float | None = None
    answered_rate_shuffled_images: float | None = None
    answered_accuracy_shuffled_images: float | None = None
    chance: float | None = None
    pass_at_k_before: float | None = None
    """In the file `pass_at_8_before`, for k = 8."""
    pass_at_k_chance: float | None = None
    """Of even guessing; in the file `pass_at_8_chance`, for k = 8."""
    pass_k: int | None = None
    """The k of pass@k."""
    mean_length_before: float | None = None
    """Tokens, in the held-out evaluation."""
    mean_length_after: float | None = None
    reflection_rate_before: float | None = None
    reflection_rate_after: float | None = None
    num_questions: int | None = None
    steps: int | None = None
    wall_s: float | None = None
    """Seconds, scoring included."""
    train_s: float | None = None
    """Seconds in optimizer steps."""
    tokens_per_s: float | None = None
    """Drawn ÷ seconds in optimizer steps."""
    seed: int | None = None
    torch: str | None = None
    """Version."""
    environment: dict[str, str] = field(default_factory=dict)
    """Date, commit, hardware, versions."""
    by_task: dict[str, TaskChange] = field(default_factory=dict)

    @classmethod
    def of(cls, before: Evaluation | None, after: Evaluation | None, **of_training: Any) -> "RunSummary":
        """From a run's evaluations, and what is known of its training by the fields' names."""
        compared: dict[str, Any] = {
            f"{name}_{when}": None if evaluation is None else evaluation.figure(name)
            for name in COMPARED
            for when, evaluation in (("before", before), ("after", after))
        }
        last = after or before
        pass_k, pass_at_k, pass_chance = (before.pass_at_k if before else None) or (None, None, None)
        return cls(
            **compared,
            answered_rate_shuffled_images=after.shuffled.answered_rate if after and after.shuffled else None,
            answered_accuracy_shuffled_images=after.answered_accuracy_shuffled_images if after else None,
            chance=last.total.chance if last else None,
            pass_at_k_before=pass_at_k,
            pass_at_k_chance=pass_chance,
            pass_k=pass_k,
            num_questions=last.total.count if last else None,
            by_task=_changes(before.by_task if before else {}, after.by_task if after else {}),
            **of_training,
        )

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "RunSummary":
        """From what summary.json holds; what is missing or broken is None."""
        if "accuracy_strict_after" not in content:  # a file from before answers were read
            content = {
                **{name: value for name, value in content.items() if name != "accuracy_by_task"},
                **{f"accuracy_strict_{when}": content.get(f"accuracy_{when}") for when in ("before", "after")},
                **{f"accuracy_{when}": None for when in ("before", "after")},
            }
        plain: dict[str, Any] = {
            f.name: number(content.get(f.name))
            for f in fields(cls)
            if f.name not in ("torch", "environment", "by_task")
        }
        for key, value in content.items():
            if (match := re.fullmatch(r"pass_at_(\d+)_(before|chance)", key)) and number(value) is not None:
                plain |= {"pass_k": int(match[1]), f"pass_at_k_{match[2]}": number(value)}
        return cls(
            **plain | {name: integer(plain[name]) for name in WHOLE} | {"chance": plain["chance"] or None},
            torch=content["torch"] if isinstance(content.get("torch"), str) else None,
            environment={str(name): str(value) for name, value in mapping(content.get("environment")).items()},
            by_task={
                str(task): TaskChange(
                    **{name: number(mapping(row).get(name)) for name in ("before", "after")},
                    chance=number(mapping(row).get("chance")) or None,
                    count=integer(mapping(row).get("count")),
                )
                for task, row in mapping(content.get("accuracy_by_task")).items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds."""
        figures = asdict(self)
        figures["accuracy_by_task"] = figures.pop("by_task")
        k, *pass_at_k = (figures.pop(name) for name in ("pass_k", "pass_at_k_before", "pass_at_k_chance"))
        if k is None:
            return figures
        return {**figures, **dict(zip((f"pass_at_{k}_before", f"pass_at_{k}_chance"), pass_at_k, strict=True))}

    def scores(self) -> dict[str, float | None]:
        """The held-out figures by what they are, in words."""
        compared = {
            f"{name.replace('_', ' ')} {when} training": getattr(self, f"{name}_{when}")
            for name in COMPARED
            for when in ("before", "after")
        }
        return compared | {
            "answered accuracy with shuffled pictures": self.answered_accuracy_shuffled_images,
            "chance": self.chance,
        }

    def filled_from(self, other: "RunSummary") -> "RunSummary":
        """The same; what is not known here comes from `other`."""
        return RunSummary(
            **{
                f.name: getattr(other if getattr(self, f.name) in (None, {}) else self, f.name)
                for f in fields(RunSummary)
            }
        )


def _changes(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> dict[str, TaskChange]:
    nothing = TaskScore()
    return {
        task: TaskChange(
            before=before.get(task, nothing).accuracy,
            after=after.get(task, nothing).accuracy,
            chance=(after.get(task) or before[task]).chance,
            count=(after.get(task) or before[task]).count,
        )
        for task in dict.fromkeys([*before, *after])
    }
