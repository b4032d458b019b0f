"""Picks what a reader should see in the model's own words: by fixed rules, so that nothing is picked to please."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastgrpo.evaluation.figures import number

_REWARDS = "rewards/"
"""Before the names of reward functions, in the columns of the completions log."""
Table = dict[str, list[Any]]


@dataclass(frozen=True)
class Sample:
    """One completion drawn in training."""

    text: str
    reward: float | None
    rewards: dict[str, float]
    """By reward function; those that abstained are left out."""
    advantage: float | None
    length: int | None
    """Tokens."""
    cut_off: bool


@dataclass(frozen=True)
class Group:
    """A prompt's completions at one step, the first few in the order they were drawn."""

    row_id: int
    step: int
    prompt: str
    task: str
    solution: str
    thumbnail: bytes | None
    samples: tuple[Sample, ...]
    size: int
    """How many there were in all."""


@dataclass(frozen=True)
class Trajectory:
    """The same question early and late in training, or two of the same type where no question came twice."""

    task: str
    early: Group
    late: Group | None
    """None when there is one step only."""

    @property
    def same_prompt(self) -> bool:
        return self.late is None or self.early.row_id == self.late.row_id


@dataclass(frozen=True)
class Answer:
    """What the model said to a held-out question."""

    text: str
    answered: bool
    """In the form asked for."""
    correct: bool


@dataclass(frozen=True)
class HeldOut:
    """A held-out question and its answers before and after training; None where that evaluation is not there."""

    task: str
    prompt: str
    solution: str
    thumbnail: bytes | None
    before: Answer | None
    after: Answer | None


@dataclass(frozen=True)
class Transitions:
    """How held-out questions moved between wrong and right, with a few of each kind."""

    counts: dict[str, int]
    examples: dict[str, list[HeldOut]] = field(default_factory=dict)


def pick_trajectories(
    files: Mapping[int, Path], notes: list[str], prompts: int = 4, samples: int = 2
) -> list[Trajectory]:
    """Questions seen at least half the training apart, one question type after the other.

    Args:
        files: completion files by step, rising.
        notes: gets a line for each file that could not be read.
        prompts: trajectories to pick.
        samples: completions of each group to show: the first by index.
    """
    tasks: dict[int, str] = {}
    steps: dict[int, list[int]] = {}
    for step, file in files.items():
        table = _read(file, ["row_id", "task"], notes)
        for row_id, task in zip(table.get("row_id", []), table.get("task", []), strict=False):
            tasks.setdefault(row_id, str(task))
            seen = steps.setdefault(row_id, [])
            if not seen or seen[-1] != step:
                seen.append(step)
    if not steps:
        return []
    span = max(seen[-1] for seen in steps.values()) - min(seen[0] for seen in steps.values())
    if span == 0:
        pairs = [(row_id, row_id) for row_id in steps]
    else:
        pairs = [(row_id, row_id) for row_id, seen in steps.items() if 2 * (seen[-1] - seen[0]) >= span]
        pairs.sort(key=lambda pair: steps[pair[0]][0] - steps[pair[0]][-1])
    if not pairs:
        pairs = _pairs_of_a_type(tasks, steps)
    chosen = _round_robin(pairs, [tasks[early] for early, _ in pairs], prompts)
    return [
        Trajectory(
            tasks[early],
            _read_group(files[steps[early][0]], steps[early][0], early, samples),
            None if span == 0 else _read_group(files[steps[late][-1]], steps[late][-1], late, samples),
        )
        for early, late in chosen
    ]


def _pairs_of_a_type(tasks: Mapping[int, str], steps: Mapping[int, list[int]]) -> list[tuple[int, int]]:
    """The earliest rows of each question type with its latest ones."""
    pairs = []
    for task in dict.fromkeys(tasks.values()):
        rows = [row_id for row_id in steps if tasks[row_id] == task]
        early = sorted(rows, key=lambda row_id: steps[row_id][0])
        late = sorted(rows, key=lambda row_id: -steps[row_id][-1])
        pairs += [(a, b) for a, b in zip(early, late, strict=True) if steps[a][0] < steps[b][-1]]
    return pairs


def _round_robin(items: Sequence[Any], kinds: Sequence[str], count: int) -> list[Any]:
    """Up to `count` items, the first of each kind, then the second of each, …"""
    queues: dict[str, list[Any]] = {}
    for item, kind in zip(items, kinds, strict=True):
        queues.setdefault(kind, []).append(item)
    longest = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)][:count]


def _read_group(file: Path, step: int, row_id: int, samples: int) -> Group:
    rows = pq.read_table(file, filters=[("row_id", "=", row_id)]).to_pylist()
    rows.sort(key=lambda row: row.get("index") or 0)
    first = rows[0]
    return Group(
        row_id=row_id,
        step=step,
        prompt=str(first.get("prompt") or ""),
        task=str(first.get("task") or ""),
        solution=str(first.get("solution") or ""),
        thumbnail=next((row["thumbnail"] for row in rows if row.get("thumbnail")), None),
        samples=tuple(_sample(row) for row in rows[:samples]),
        size=len(rows),
    )


def _sample(row: Mapping[str, Any]) -> Sample:
    rewards = {name.removeprefix(_REWARDS): number(value) for name, value in row.items() if name.startswith(_REWARDS)}
    length = number(row.get("length"))
    return Sample(
        text=str(row.get("completion") or ""),
        reward=number(row.get("reward")),
        rewards={name: value for name, value in rewards.items() if value is not None},
        advantage=number(row.get("advantage")),
        length=None if length is None else round(length),
        cut_off=row.get("finish_reason") == "length",
    )


def pick_held_out(folder: Path, notes: list[str], each: int = 2) -> Transitions | None:
    """Held-out questions before and after, counted by how they moved; the first `each` of every kind by row.

    Args:
        folder: the run's `evals/`.
        notes: gets a line for each file that could not be read.
    """
    files = {name: folder / f"{name}.parquet" for name in ("before", "after")}
    correct = {name: _correct_by_row(file, notes) for name, file in files.items() if file.is_file()}
    correct = {name: rows for name, rows in correct.items() if rows}
    if not correct:
        return None
    shared = sorted(set.intersection(*(set(rows) for rows in correct.values())))
    kinds: dict[str, list[int]] = {}
    for row_id in shared:
        words = ["right" if rows[row_id] else "wrong" for rows in correct.values()]
        kinds.setdefault(" → ".join(words), []).append(row_id)
    order = [
        kind
        for kind in ("wrong → right", "right → right", "wrong → wrong", "right → wrong", "right", "wrong")
        if kind in kinds
    ]
    chosen = [row_id for kind in order for row_id in kinds[kind][:each]]
    tables = {name: _rows_by_id(files[name], chosen) for name in correct}
    return Transitions(
        counts={kind: len(kinds[kind]) for kind in order},
        examples={kind: [_held_out(row_id, tables) for row_id in kinds[kind][:each]] for kind in order},
    )


def _correct_by_row(file: Path, notes: list[str]) -> dict[int, bool]:
    table = _read(file, ["row_id", "correct"], notes)
    return dict(zip(table.get("row_id", []), map(bool, table.get("correct", [])), strict=False))


def _rows_by_id(file: Path, row_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    rows = pq.read_table(file, filters=[("row_id", "in", list(row_ids))]).to_pylist()
    return {row["row_id"]: row for row in rows}


def _held_out(row_id: int, tables: Mapping[str, Mapping[int, dict[str, Any]]]) -> HeldOut:
    rows = {name: table[row_id] for name, table in tables.items()}
    any_row = next(iter(rows.values()))
    answers = {
        name: Answer(str(row.get("completion") or ""), bool(row.get("answered")), bool(row.get("correct")))
        for name, row in rows.items()
    }
    return HeldOut(
        task=str(any_row.get("task") or ""),
        prompt=str(any_row.get("prompt") or ""),
        solution=str(any_row.get("solution") or ""),
        thumbnail=next((row["thumbnail"] for row in rows.values() if row.get("thumbnail")), None),
        before=answers.get("before"),
        after=answers.get("after"),
    )


def _read(file: Path, columns: list[str], notes: list[str]) -> Table:
    """Columns of a parquet file; an empty table and a note when it cannot be read (cut off by a crash, say)."""
    try:
        return pq.read_table(file, columns=columns).to_pydict()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].replace(str(file), file.name)
        notes.append(f"{file.parent.name}/{file.name} could not be read ({reason})")
        return {}
