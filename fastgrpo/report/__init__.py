"""One self-contained HTML page about a training run, or about several runs side by side."""

from fastgrpo.report.finish import finish_run
from fastgrpo.report.page import write_report

__all__ = ["finish_run", "write_report"]
