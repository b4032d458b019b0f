"""The aha page's charts: each measure step by step, a line for each arm with its 95 % band over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastgrpo.report.arms import ArmRuns
from fastgrpo.report.curves import Curve, curve
from fastgrpo.report.plots import SERIES, Chart, legend, render
from fastgrpo.report.run import Floats
from fastgrpo.report.seeds import t_quantile
from fastgrpo.report.trends import accuracy_metric

STROKES = ("-", "--", ":")
"""Of the first arms as many as there are colours, of the next, …"""


@dataclass(frozen=True)
class ArmPanel:
    """One axis: a metric of all arms."""

    metric: str
    ylabel: str
    percent: bool = False


ACCURACY = "accuracy"
"""Stands for the accuracy reward, whatever its function is called."""


def arm_charts(arms: Sequence[ArmRuns]) -> list[Chart]:
    """The charts of what any arm logged."""
    share = "Share of completions"
    plans = [
        ("accuracy", "Accuracy in training", [ArmPanel(ACCURACY, "accuracy reward", percent=True)],
         "Mean accuracy reward of the answers drawn at a step. Held-out accuracy is in the table."),
        ("length", "Response length", [ArmPanel("completions/mean_length", "tokens")],
         "Mean tokens of a response. Longer is not better by itself: read it with accuracy and with the controls."),
        ("reflection", "Reflective phrases", [
            ArmPanel("reflection_rate", "of responses", percent=True),
            ArmPanel("reflections_per_1k_tokens", "per 1,000 tokens"),
        ], "Above, the share of responses with a reflective phrase; below, how many phrases 1,000 tokens hold, which "
           "length alone does not raise. The phrases are in fastgrpo/scoring/reflective_phrases.txt."),
        ("correction", "Self-correction", [
            ArmPanel("self_correction/wrong_to_right", "wrong → right", percent=True),
            ArmPanel("self_correction/right_to_wrong", "right → wrong", percent=True),
        ], f"{share} that propose one option in the reasoning and answer another: a change for the better, or for the "
           "worse. Where both lines are alike, reconsidering does not help."),
        ("entropy", "Entropy", [ArmPanel("entropy", "nats")],
         "Mean entropy of a token's distribution; near zero, exploration has ended."),
        ("kl", "KL from the starting model", [ArmPanel("kl", "nats")], "Logged where beta is above 0."),
    ]  # fmt: skip
    charts = (_chart(arms, name, title, panels, caption) for name, title, panels, caption in plans)
    return [chart for chart in charts if chart is not None]


def _chart(arms: Sequence[ArmRuns], name: str, title: str, panels: Sequence[ArmPanel], caption: str) -> Chart | None:
    """Panels one below the other; None when no arm logged any of them."""
    found = [(panel, lines) for panel in panels if (lines := _lines(arms, panel.metric))]
    if not found:
        return None

    def draw(figure: Figure) -> str:
        grid = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
        said = []
        for axes, (panel, lines) in zip(grid, found, strict=True):
            said += _draw(axes, panel, lines)
        legend(grid[0])
        grid[-1].set_xlabel("optimizer step")
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        figure.align_ylabels()
        return f"{title} against optimizer step. " + " ".join(said)

    return render(f"arms-{name}", title, (5.0, 2.6 + 1.3 * (len(found) - 1)), draw, caption)


def _lines(arms: Sequence[ArmRuns], metric: str) -> dict[tuple[int, str], Curve]:
    """By place and name of the arm."""
    lines = {}
    for place, arm in enumerate(arms):
        runs = list(arm.runs.values())
        column = next(filter(None, map(accuracy_metric, (run.metrics for run in runs))), None)
        found = curve(runs, (column or "") if metric == ACCURACY else metric) if runs else None
        if found is not None:
            lines[place, arm.name] = found
    return lines


def _draw(axes: Any, panel: ArmPanel, lines: dict[tuple[int, str], Curve]) -> list[str]:
    said = []
    for (place, name), found in lines.items():
        scaled = replace(found, values=found.values * (100.0 if panel.percent else 1.0))
        smooth = scaled.smooth
        mean = np.where(smooth.shared, smooth.mean, np.nan)
        color, stroke = SERIES[place % len(SERIES)], STROKES[place // len(SERIES) % len(STROKES)]
        half = band_half_width(smooth)
        if np.isfinite(half).any():
            axes.fill_between(found.steps, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
        marker = "o" if len(found.steps) < 3 else None
        axes.plot(found.steps, mean, color=color, linestyle=stroke, label=name, linewidth=1.6, marker=marker)
        known = np.flatnonzero(np.isfinite(mean))
        if len(known):
            said.append(f"{name}, {panel.ylabel}: {mean[known[0]]:.3g} at first, {mean[known[-1]]:.3g} at last.")
    axes.set_ylabel(panel.ylabel)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if panel.percent:
        axes.yaxis.set_major_formatter("{x:g}%")
    # A wide band of few seeds must not flatten the means.
    means = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    if np.isfinite(means).any():
        top = float(np.nanmax(means))
        axes.set_ylim(0, max(1.3 * top, 1.0 if panel.percent else 1e-3))
    return said


def band_half_width(found: Curve) -> Floats:
    """Half of Student's 95 % interval of the mean over runs at each step [S]; NaN below two runs."""
    counts = np.isfinite(found.values).sum(0)
    factors = np.array([t_quantile(int(n) - 1) / np.sqrt(n) if n > 1 else np.nan for n in counts])
    return found.std * factors
