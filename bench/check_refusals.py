"""Refusal rates of published answers to MOSSBench by the string matcher, against the published rates.

FOLDER holds `information.json` and `responses-<model>.json` (pid → answer). A rate may be 2 points off.
"""

import json
import sys
from pathlib import Path

from harness import Result, parser, print_table

from fastgrpo.data.mossbench import BENIGN, STIMULI
from fastgrpo.scoring.refusals import is_refusal

PUBLISHED = {"claude-3-opus-web": 70.67, "gpt-4o": 6.33}
"""Refusals in %, https://arxiv.org/abs/2406.17806."""
ALLOWED = 2.0


def main() -> int:
    arguments = parser("Refusal rates by the string matcher, in %.")
    arguments.add_argument("folder", type=Path, help="of information.json and responses-<model>.json")
    options = arguments.parse_args()
    questions = json.loads((options.folder / BENIGN).read_text())
    result, rows = Result("check_refusals", options.device), []
    for file in sorted(options.folder.glob("responses-*.json")):
        model = file.stem.removeprefix("responses-")
        refused = {pid: is_refusal(answer) for pid, answer in json.loads(file.read_text()).items()}
        by_type = {
            name: percent([refused[pid] for pid, one in questions.items() if one["metadata"]["over"] == key])
            for key, name in STIMULI.items()
        }
        total = percent(list(refused.values()))
        result.figures[model] = {"total": total, "by_type": by_type, "n": len(refused)}
        if model in PUBLISHED:
            result.checks[model] = abs(total - PUBLISHED[model]) <= ALLOWED
        rows.append([model, len(refused), PUBLISHED.get(model, "–"), total, *by_type.values()])
    if not rows:
        raise SystemExit(f"{options.folder}: no responses-<model>.json")
    print_table("refused, %", ["model", "answers", "published", "total", *STIMULI.values()], rows)
    return result.finish(options.out)


def percent(values: list[bool]) -> float:
    return 100 * sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
