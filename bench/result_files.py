"""The records in `bench/results`, and figures in them."""

import json
from collections.abc import Mapping
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

    def newest_on_gpu(self) -> ResultFile | None:
        """The last suite of full scale."""
        suites = (one for one in self.files if one.record["bench"] == "suite")
        return _newest([one for one in suites if one.record.get("scale") == "full"])


def _newest(files: list[ResultFile]) -> ResultFile | None:
    return max(files, key=lambda one: one.record.get("date", ""), default=None)


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


def passed_stages(suite: ResultFile | None) -> dict[str, Any]:
    """A suite's figures and ratios by stage, of the stages that passed."""
    stages = suite.record["stages"] if suite else {}
    passed = {name: stage for name, stage in stages.items() if stage["status"] == "passed"}
    return {name: {**stage["figures"], "ratios": stage["ratios"]} for name, stage in passed.items()}
