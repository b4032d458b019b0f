"""`fastgrpo report`: one page for a run; curves with error bars for several."""

from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.options import Parser


def run(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    parser = Parser(prog="fastgrpo report", description="One page for a run; curves with error bars for several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument("--out", type=Path, help="the page's file")
    options = parser.parse_args(argv)

    from fastgrpo.report import write_report

    try:
        print(write_report(options.runs, options.out))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written: {error.strerror}. Name a file with --out.") from error
