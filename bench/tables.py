"""Writes the newest results of `bench/results` into the tables of READMEs and docs, between their markers.

python bench/tables.py             # rewrites what lies between <!-- bench:NAME --> and <!-- /bench -->
python bench/tables.py --check     # exits 1 where a table and the files disagree
"""

import argparse
import re
import sys
from pathlib import Path

from result_files import Results
from table_blocks import BLOCKS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "kernels/README.md", "bench/README.md", "docs/families.md")
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def rewritten(text: str, results: Results) -> str:
    """A page with every block made anew.

    Raises:
        ValueError: a marker that names no table.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"bench:{match[2]} is no table: use one of {', '.join(BLOCKS)}.")
        return match[1] + BLOCKS[match[2]](results) + match[4]

    return BLOCK.sub(block, text)


def main() -> int:
    arguments = argparse.ArgumentParser(description="Writes the newest results into the READMEs' tables.")
    arguments.add_argument("--check", action="store_true", help="change nothing; exit 1 where they disagree")
    arguments.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help=argparse.SUPPRESS)
    arguments.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    results, stale = Results(options.results), []
    for page in PAGES:
        path = options.root / page
        text = path.read_text()
        new = rewritten(text, results)
        if new != text:
            stale.append(page)
            if not options.check:
                path.write_text(new)
    if stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
