"""Measures every tiny family against transformers and writes docs/families.md and its data file.

python bench/bench_families.py             # both anew
python bench/bench_families.py SmolVLM     # of these families alone
python bench/bench_families.py --table     # the page from the data file
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from family_parity import sampler_error, steps_error, update_errors
from family_ranks import ranks_errors
from harness import versions
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES, VISION_FAMILIES, family

from fastgrpo.model.freezing import freeze
from fastgrpo.sampler.choice import is_packed, unsupported
from fastgrpo.update.packed_forward import require_packed_support

DOCS = Path(__file__).parents[1] / "docs"
DATA, PAGE = DOCS / "families.json", DOCS / "families.md"
ERRORS = {
    "sampler_logprob": "log-probs: sampler",
    "update_logprob": "update",
    "update_gradient": "gradients",
    "lora_sampler_logprob": "LoRA: sampler",
    "lora_update_gradient": "gradients",
    "steps": "two steps",
    "lora_steps": "LoRA",
    "frozen_tower_steps": "frozen tower",
    "frozen_text_steps": "frozen text",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
"""Key in a record → head of its column."""
START, END = "<!-- families -->\n", "<!-- /families -->\n"


def measure(name: str) -> dict[str, Any]:
    """Paths and errors of a family; errors of None where the path is transformers' own."""
    model, prompts = family(name)
    reason, padded = unsupported(model), ""
    try:
        require_packed_support(model)
    except ValueError as error:
        padded = str(error)
    record: dict[str, Any] = {
        "family": name,
        "class": type(model).__name__,
        "pictures": name in VISION_FAMILIES,
        "sampler": "packed" if is_packed(model) else "generic" if reason is None else "transformers",
        "update": "padded" if padded else "packed",
        "reasons": [text for text in (reason, padded) if text],
    }
    record["sampler_logprob"] = None if reason else sampler_error(model, prompts)
    record["update_logprob"], record["update_gradient"] = (None, None) if padded else update_errors(model, prompts)
    record["steps"] = None if padded else steps_error(model, prompts)
    for part in ("tower", "text"):
        measured = record["pictures"] and not padded
        record[f"frozen_{part}_steps"] = frozen_steps_error(model, prompts, part) if measured else None
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, adapters).eval()
    record["lora_sampler_logprob"] = None if reason else sampler_error(adapted, prompts)
    record["lora_update_gradient"] = None if padded else update_errors(adapted, prompts)[1]
    record["lora_steps"] = None if padded else steps_error(adapted, prompts)
    return record


def frozen_steps_error(model: Any, prompts: Any, part: str) -> float:
    """`steps_error` with the vision "tower" or the "text" model frozen."""
    frozen = copy.deepcopy(model)
    freeze(frozen, freeze_vision=part == "tower", freeze_llm=part == "text")
    return steps_error(frozen, prompts)


def measure_ranks(records: list[dict[str, Any]]) -> None:
    """Adds to each record what two ranks make of the family under ZeRO 2 and 3."""
    cases = [f"{stage}:{r['family']}" for r in records for stage in (2, 3) if r["update"] == "packed"]
    with tempfile.TemporaryDirectory() as folder:
        errors = ranks_errors(cases, Path(folder))
    for record in records:
        for stage in (2, 3):
            record[f"zero{stage}"] = errors.get(f"{stage}:{record['family']}")


def table(records: list[dict[str, Any]]) -> str:
    """The page's table."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    heads = ["family", "class", "sampler", "update", *ERRORS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for record in records:
        cells = [record["family"], f"`{record['class']}`", record["sampler"], record["update"]]
        lines.append(f"| {' | '.join([*cells, *(figure(record[name]) for name in ERRORS)])} |")
    reasons = [f"- {r['family']}: {reason}" for r in records for reason in r["reasons"]]
    return "\n".join([*lines, *(["", "Why not:", "", *reasons] if reasons else []), ""])


def page(text: str, records: list[dict[str, Any]]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(START)
    return f"{before}{START}{table(records)}{END}{rest.split(END)[1]}"


def limit(name: str) -> float:
    """The largest error promised in a column."""
    return 1e-5 if name == "update_gradient" else 1e-3 if name.endswith("steps") else 1e-4


def main() -> int:
    """Writes the files; 1 if a figure is beyond what is promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="measure these alone; the others stay")
    parser.add_argument("--table", action="store_true", help="write the page from the data file, measure nothing")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        chosen = options.families or FAMILIES
        fresh = []
        for name in chosen:
            fresh.append(measure(name))
            print(json.dumps(fresh[-1]), flush=True)
        measure_ranks(fresh)
        kept = {} if chosen is FAMILIES else {r["family"]: r for r in json.loads(DATA.read_text())["families"]}
        kept |= {record["family"]: record for record in fresh}
        records = [kept[name] for name in FAMILIES if name in kept]
        DATA.write_text(json.dumps({"versions": versions(), "families": records}, indent=1) + "\n")
    records = json.loads(DATA.read_text())["families"]
    PAGE.write_text(page(PAGE.read_text(), records))
    bad = [
        record["family"]
        for record in records
        for name, value in record.items()
        if isinstance(value, float) and value > limit(name)
    ]
    print("beyond what is promised:", ", ".join(bad) or "none")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
