"""`fastgrpo report`: one page for a run; curves with error bars for several; the arms of a lab side by side."""

from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.options import Parser
from fastgrpo.safe_text.inert import inert


def run(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    parser = Parser(
        prog="fastgrpo report",
        description="One page for a run; curves with error bars for several; a lab's arms side by side.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs, or of one lab")
    parser.add_argument("--out", type=Path, help="the page's file")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="also write each chart there, as SVG and PNG")
    options = parser.parse_args(argv)

    from fastgrpo.report.arms import is_lab
    from fastgrpo.report.lab_page import write_lab_report
    from fastgrpo.report.page import write_report

    labs = [folder for folder in options.runs if is_lab(folder)]
    if labs and len(options.runs) > 1:
        raise ValueError(f"{labs[0]} is a lab, which has a page of its own: name it alone")
    try:
        if labs:
            page = write_lab_report(labs[0], options.out, options.export)
        else:
            page = write_report(options.runs, options.out, options.export)
    except OSError as error:
        fix = "Name a file with --out, a folder with --export."
        raise ValueError(f"{error.filename} cannot be written: {error.strerror}. {fix}") from error
    print(inert(str(page)))
