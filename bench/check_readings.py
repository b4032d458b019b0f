"""How often evaluation reads an answer as published: models' answers to BLINK, and what its authors read in them.

FOLDER holds `<model>-<task>.json`: per question `full_prediction`, and `prediction`, the option read out of it, where
(Z) means none. Needs at least 98.5 % agreement over all.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from harness import Result, parser, print_table

from fastgrpo.scoring.readings import read_option

CHOICES = {"Relative_Depth": ["A is closer", "B is closer"], "Spatial_Relation": ["yes", "no"]}
NEEDED = 0.985


def main() -> int:
    arguments = parser("Agreement of evaluation's readings with the published ones.")
    arguments.add_argument("folder", type=Path, help="of `<model>-<task>.json`")
    options = arguments.parse_args()
    agreeing, questions = Counter[str](), Counter[str]()
    differing = []
    for file in sorted(options.folder.glob("*.json")):
        model, _, task = file.stem.rpartition("-")
        if task not in CHOICES:
            continue
        for row in json.loads(file.read_text()):
            read = f"({read_option(row['full_prediction'], CHOICES[task]) or 'Z'})"
            questions[model] += 1
            agreeing[model] += read == row["prediction"]
            if read != row["prediction"]:
                differing.append([model, row["idx"], row["prediction"], read, " ".join(row["full_prediction"].split())])
    if not questions:
        raise SystemExit(f"{options.folder}: no <model>-<task>.json with a task of {', '.join(CHOICES)}")
    agreement = agreeing.total() / questions.total()
    by_model = {model: agreeing[model] / questions[model] for model in questions}
    print_table("read otherwise than published", ["model", "question", "published", "read", "answer"], differing)
    print_table("agreement", ["model", "questions", "agreement"], [[m, questions[m], by_model[m]] for m in questions])
    result = Result("check_readings", options.device, checks={"agreement": agreement >= NEEDED})
    result.figures = {"agreement": agreement, "questions": questions.total(), "by_model": by_model}
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
