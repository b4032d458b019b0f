"""`fastgrpo lab`: arms × seeds from one YAML file."""

from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.options import Parser, at_least, require_writable


def run(argv: Sequence[str]) -> None:
    """Makes the runs that are not done, draws the lab's page, and fails where a run did."""
    parser = Parser(
        prog="fastgrpo lab",
        description="Arms × seeds from one YAML file, each an ordinary run; then their page. What is done is left out.",
    )
    parser.add_argument("config", type=Path, help="the lab's file, such as configs/lab_aha.yaml")
    parser.add_argument("--jobs", type=at_least(1), help="runs at a time; one per GPU if unset")
    options = parser.parse_args(argv)

    from fastgrpo.cli.console import say
    from fastgrpo.lab.config import read_lab
    from fastgrpo.lab.runner import run_lab
    from fastgrpo.report.lab_page import write_lab_report

    lab = read_lab(options.config)
    require_writable(lab.output_dir)
    try:
        failed = run_lab(lab, options.jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it stopped") from None
    if any(lab.output_dir.glob("*/seed-*/metrics.jsonl")):
        say(f"report: {write_lab_report(lab.output_dir)}")
    if failed:
        raise ValueError(f"failed: {', '.join(run.name for run in failed)}. The same command tries these again.")
