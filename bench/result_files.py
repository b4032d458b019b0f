"""The records in `bench/results`, and figures in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_YET = "not measured yet"


@dataclass(frozen=True)
class ResultFile:
    """One runner's record."""

    name: str
    record: Mapping[str, Any]

    def ratio(self, name: str) -> float | None:
        """Theirs over ours."""
        return self.record.get("ratios", {}).get(name)


class Results:
    """All records of a folder."""

    def __init__(self, folder: Path) -> None:
        read = [ResultFile(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
        self.files = [one for one in read if isinstance(one.record, dict) and "bench" in one.record]

    def newest(self, bench: str, *, ratio: str | None = None) -> ResultFile | None:
        """The last one of a runner on a CPU, by the date in it; `ratio`: that holds this one."""
        fitting = [one for one in self.files if one.record["bench"] == bench and one.record["device"].startswith("cpu")]
        return _newest([one for one in fitting if ratio is None or one.ratio(ratio) is not None])

    def first_step(self) -> ResultFile | None:
        """The paper's step as first written, on a GPU."""
        return _newest([one for one in self.files if one.record["bench"] == "first_step"])

    def cards(self) -> "list[Card]":
        """Each kind of GPU that a suite of full scale ran on, the one of the newest suite first."""
        suites = [one for one in self.files if one.record["bench"] == "suite" and one.record.get("scale") == "full"]
        by_card: dict[str, list[ResultFile]] = {}
        for suite in sorted(suites, key=_date, reverse=True):
            by_card.setdefault(suite.record["device"], []).append(suite)
        return [Card(name, tuple(files)) for name, files in by_card.items()]


@dataclass(frozen=True)
class Card:
    """A kind of GPU, with the suites that ran on it."""

    name: str
    files: tuple[ResultFile, ...]
    """The newest first."""

    @property
    def stages(self) -> dict[str, Any]:
        """Figures and ratios by stage, each from the newest suite in which it passed."""
        found: dict[str, Any] = {}
        for suite in reversed(self.files):
            found |= passed_stages(suite)
        return found

    @property
    def used(self) -> list[ResultFile]:
        """The suites that a figure of `stages` is from."""
        newer: set[str] = set()
        used = []
        for suite in self.files:
            passed = set(passed_stages(suite))
            used += [suite] if passed - newer else []
            newer |= passed
        return used


def _newest(files: list[ResultFile]) -> ResultFile | None:
    return max(files, key=_date, default=None)


def _date(one: ResultFile) -> str:
    return str(one.record.get("date", ""))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    head, *body = ("".join(f"| {cell} " if cell else "| " for cell in line) + "|\n" for line in (columns, *rows))
    return head + "|---" * len(columns) + "|\n" + "".join(body)


def formatted(form: str, figures: Mapping[str, Any], *path: str | None) -> str:
    """The figure at the end of a path, in a form such as "{:.1f} ms"; or that it was not measured.

    None in the path takes the first of the entries there.
    """
    found: Any = figures
    for name in path:
        if not found or (name is not None and name not in found):
            return NOT_YET
        found = next(iter(found.values())) if name is None else found[name]
    return form.format(found)


def passed_stages(suite: ResultFile) -> dict[str, Any]:
    """A suite's figures and ratios by stage, of the stages that passed."""
    stages = suite.record["stages"]
    passed = {name: stage for name, stage in stages.items() if stage["status"] == "passed"}
    return {name: {**stage["figures"], "ratios": stage["ratios"]} for name, stage in passed.items()}
