"""One self-contained HTML page about a training run, or about several runs side by side."""

from fastgrpo.report.page import write_report

__all__ = ["write_report"]
