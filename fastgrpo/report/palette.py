"""The colours of every page's plots."""

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1d2733", "#e3e8ee"),
    "muted": ("#5d6978", "#9aa7b5"),
    "grid": ("#e4e8ed", "#2c3642"),
    "before": ("#8d99a8", "#7d8b9b"),
    "c1": ("#1f5fbf", "#6ea8ff"),
    "c2": ("#c2570c", "#f0955a"),
    "c3": ("#0b7d62", "#4cc3a0"),
    "c4": ("#7a4fc0", "#b795f2"),
    "c5": ("#b3275e", "#f083ad"),
    "c6": ("#8a6d00", "#d6b94a"),
    "c7": ("#2a7f9e", "#6cc3e0"),
}
"""Colour of each CSS variable `--plot-<name>` in the light and in the dark theme."""
