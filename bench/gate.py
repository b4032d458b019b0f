"""Whether we lost ground: our time against the reference's, of one pytest-benchmark run, beside the committed ratios.

    python -m pytest bench --benchmark-only --benchmark-json runs/bench.json && python bench/gate.py runs/bench.json

Both times come from one run, so the ratio (theirs ÷ ours, of the fastest rounds, which other programs disturb least)
carries over to other machines of the kind far better than a time does. The gate fails where a ratio is below the
committed one ÷ the tolerance, and where a ratio that was committed is not measured any more. `--accept` commits to what
was measured.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Result, parser, print_table

OURS, REFERENCE, PEER = "ours", "reference", "peer"
"""What a benchmark tells in `extra_info["role"]`; peers are shown by pytest-benchmark and do not count here."""
TIMER = time.perf_counter if torch.cuda.is_available() else time.process_time
"""What the suites time with: on a CPU the processor's seconds, which other programs lengthen less than the clock's."""
TOLERANCE = 1.3
"""How many times smaller a ratio may be than the committed one. Of two runs on a CPU with more to do than it had cores,
ratios differed by up to 12 %."""


class Verdict(NamedTuple):
    """One ratio against its baseline."""

    name: str
    passed: bool
    text: str


def ratios_of(benchmarks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Group → the reference's fastest round ÷ ours. Groups without both are left out.

    Args:
        benchmarks: of pytest-benchmark's JSON file.
    """
    fastest: dict[str, dict[str, float]] = {}
    for benchmark in benchmarks:
        role = benchmark["extra_info"].get("role", PEER)
        fastest.setdefault(benchmark["group"], {})[role] = benchmark["stats"]["min"]
    return {
        group: roles[REFERENCE] / roles[OURS] for group, roles in fastest.items() if {OURS, REFERENCE} <= set(roles)
    }


def verdicts(ratios: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> list[Verdict]:
    """One for each name measured or committed to."""
    found = []
    for name in dict.fromkeys([*baseline, *ratios]):
        if name not in ratios:
            found.append(Verdict(name, False, "not measured"))
        elif name not in baseline:
            found.append(Verdict(name, True, "new"))
        else:
            kept = ratios[name] >= baseline[name] / tolerance
            found.append(Verdict(name, kept, "kept" if kept else "LOST"))
    return found


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("run", type=Path, help="JSON file of pytest-benchmark")
    arguments.add_argument("--baseline", type=Path, help="bench/results/ratios-DEVICE.json if unset")
    arguments.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"{TOLERANCE:g} if unset")
    arguments.add_argument("--accept", action="store_true", help="write what was measured as the new baseline")
    options = arguments.parse_args()
    if not options.run.is_file():
        arguments.error(
            f"{options.run} is missing: write it with `pytest bench --benchmark-only --benchmark-json FILE`"
        )
    if options.tolerance < 1:
        arguments.error(f"--tolerance {options.tolerance} is not valid: use 1 or more")
    path = options.baseline or Path(__file__).parent / "results" / f"ratios-{options.device}.json"
    ratios = ratios_of(json.loads(options.run.read_text())["benchmarks"])
    committed = json.loads(path.read_text())["ratios"] if path.exists() and not options.accept else {}
    found = verdicts(ratios, committed, options.tolerance)
    result = Result("gate", options.device, ratios=ratios)
    result.checks = {f"{verdict.name} kept": verdict.passed for verdict in found}
    result.figures = {"baseline": committed, "tolerance": options.tolerance}
    rows = [[v.name, committed.get(v.name, "–"), ratios.get(v.name, "–"), v.text] for v in found]
    print_table(f"Reference ÷ ours; lost below baseline ÷ {options.tolerance:g}", ["", "baseline", "now", ""], rows)
    return result.finish(str(path) if options.accept else options.out)


if __name__ == "__main__":
    sys.exit(main())
