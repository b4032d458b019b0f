"""Measures every tiny family against transformers and writes docs/families.md and its data file.

python bench/bench_families.py             # both anew
python bench/bench_families.py --table     # the page from the data file
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from family_parity import sampler_error, update_errors
from harness import versions
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES, VISION_FAMILIES, family

from fastgrpo.sampler.choice import is_packed, unsupported
from fastgrpo.update.packed_forward import require_packed_support

DOCS = Path(__file__).parents[1] / "docs"
DATA, PAGE = DOCS / "families.json", DOCS / "families.md"
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
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, adapters).eval()
    record["lora_sampler_logprob"] = None if reason else sampler_error(adapted, prompts)
    record["lora_update_gradient"] = None if padded else update_errors(adapted, prompts)[1]
    return record


def table(records: list[dict[str, Any]]) -> str:
    """The page's table."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    lines = [
        "| family | class | sampler | update | log-probs: sampler | update | gradients "
        "| with LoRA: sampler | gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    errors = ("sampler_logprob", "update_logprob", "update_gradient", "lora_sampler_logprob", "lora_update_gradient")
    for record in records:
        cells = [record["family"], f"`{record['class']}`", record["sampler"], record["update"]]
        lines.append(f"| {' | '.join([*cells, *(figure(record[name]) for name in errors)])} |")
    reasons = [f"- {r['family']}: {reason}" for r in records for reason in r["reasons"]]
    return "\n".join([*lines, *(["", "Why not:", "", *reasons] if reasons else []), ""])


def page(text: str, records: list[dict[str, Any]]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(START)
    return f"{before}{START}{table(records)}{END}{rest.split(END)[1]}"


def main() -> int:
    """Writes the files; 1 if a figure is beyond what is promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the page from the data file, measure nothing")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        records = []
        for name in FAMILIES:
            records.append(measure(name))
            print(json.dumps(records[-1]), flush=True)
        DATA.write_text(json.dumps({"versions": versions(), "families": records}, indent=1) + "\n")
    records = json.loads(DATA.read_text())["families"]
    PAGE.write_text(page(PAGE.read_text(), records))
    bad = [
        record["family"]
        for record in records
        for name, value in record.items()
        if isinstance(value, float) and value > (1e-5 if name == "update_gradient" else 1e-4)
    ]
    print("beyond 1e-4, or 1e-5 in a gradient without adapters:", ", ".join(bad) or "none")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
