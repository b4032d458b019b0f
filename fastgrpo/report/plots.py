"""Matplotlib figures as inline SVG, colours as CSS variables so that they follow the theme; curves over steps."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastgrpo.report.curves import Curve, curve
from fastgrpo.report.palette import PALETTE
from fastgrpo.report.run import Run
from fastgrpo.safe_text.inert import inert

INK, MUTED, GRID, BEFORE = (PALETTE[name][0] for name in ("ink", "muted", "grid", "before"))
SERIES = [PALETTE[f"c{i}"][0] for i in range(1, 8)]

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastgrpo",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.0,
    "legend.labelcolor": INK,
}


LONGEST_LABEL = 45
"""Characters of a legend's label."""


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page."""

    name: str
    title: str
    svg: Markup
    caption: str
    """What it shows and what to look for."""
    size: tuple[float, float]
    """Inches."""
    draw: Callable[[Figure], str]


def export(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Writes each chart as a file of its own, `{name}.svg` and `{name}.png` at 300 dots an inch, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context({**_STYLE, "savefig.facecolor": "white"}):
        for chart in charts:
            figure = Figure(figsize=chart.size, layout="constrained")
            chart.draw(figure)
            for canvas, ending in ((FigureCanvasSVG, "svg"), (FigureCanvasAgg, "png")):
                canvas(figure)
                files.append(folder / f"{chart.name}.{ending}")
                figure.savefig(files[-1], dpi=300, metadata={"Date": None} if ending == "svg" else None)
    return files


def render(name: str, title: str, size: tuple[float, float], draw: Callable[[Figure], str], caption: str) -> Chart:
    """Draws on a figure of `size` inches. `draw` returns the alternative text.

    A chart is as wide as the column or the phone it stands in: at 5 inches its text is about as large as the page's.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        alt = draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return Chart(name, title, _inline(buffer.getvalue(), name, alt), caption, size, draw)


def _inline(svg: str, name: str, alt: str) -> Markup:
    """An SVG document as an element of the page: scalable, themed, ids its own, labelled."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', body)
    assert view_box is not None, "matplotlib writes a view box"
    body = re.sub(r"<svg[^>]*>", "", body, count=1)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    body = body.replace("xlink:href", "href")
    for variable, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--plot-{variable})")
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {view_box[0]} role="img" aria-label="{escape(alt)}">'
    return Markup(inert(opening + body))


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    color: str
    width: float = 1.6


@dataclass(frozen=True)
class Panel:
    """One axis of a chart over steps."""

    lines: Sequence[Line]
    ylabel: str
    band: tuple[str, str] | None = None
    """Metrics of the lower and upper edge of a band: of each step, the least and the greatest of any run."""
    percent: bool = False
    from_zero: bool = False
    cut_outliers: bool = False
    """Cut values at 2.5 medians, so that a few slow steps do not flatten the rest."""
    height: float = 1.0


def panels(
    runs: Sequence[Run],
    name: str,
    size: tuple[float, float],
    rows: Sequence[Panel],
    caption: str,
    title: str,
) -> Chart | None:
    """Panels one below the other over a shared step axis; None when no run logged any of the metrics."""
    kept = [panel for panel in rows if any(curve(runs, line.metric) for line in panel.lines)]
    if not kept:
        return None

    def draw(figure: Figure) -> str:
        heights = [panel.height for panel in kept]
        grid = figure.subplots(len(kept), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        said = [part for axes, panel in zip(grid[:, 0], kept, strict=True) for part in _draw_panel(axes, runs, panel)]
        grid[-1, 0].set_xlabel("optimizer step")
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7 if size[0] > 4 else 4))
        figure.align_ylabels()
        return f"{title} against optimizer step. " + " ".join(said)

    return render(name, title, size, draw, caption)


def _draw_panel(axes: Any, runs: Sequence[Run], panel: Panel) -> list[str]:
    scale = 100.0 if panel.percent else 1.0
    said = []
    if panel.band is not None:
        low, high = curve(runs, panel.band[0]), curve(runs, panel.band[1])
        if low is not None and high is not None:
            color = panel.lines[0].color
            edges = (scale * low.least, scale * high.greatest)
            axes.fill_between(low.steps, *edges, color=color, alpha=0.12, linewidth=0, label="shortest to longest")
    for line in panel.lines:
        found = curve(runs, line.metric)
        if found is not None:
            values = scale * found.values
            if panel.cut_outliers:
                values = np.minimum(values, 2.5 * np.nanmedian(values))
            scaled = Curve(found.steps, values)
            _draw_line(axes, scaled, line, raw=len(panel.lines) <= 2)
            said.append(_in_words(line.label, scaled, " %" if panel.percent else ""))
    axes.set_ylabel(panel.ylabel)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if panel.percent:
        axes.yaxis.set_major_formatter("{x:g}%")
    else:
        # In digits alone a learning rate takes half of a small chart.
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    if panel.from_zero:
        top = 1.04 * axes.get_ylim()[1]
        axes.set_ylim(0, max(top, 1.0) if panel.percent else top)
    if len(panel.lines) > 1 or panel.band:
        legend(axes)
    return said


def _draw_line(axes: Any, found: Curve, line: Line, raw: bool) -> None:
    """One run: the raw values faint, their rolling mean strong. Several: each faint, mean strong, ± std shaded."""
    smooth = found.smooth
    steps, std = found.steps, smooth.std
    mean = np.where(smooth.shared, smooth.mean, np.nan)
    if raw or len(found.values) > 1:
        faint = smooth if len(found.values) > 1 else found
        for row in faint.values:
            axes.plot(steps, row, color=line.color, linewidth=0.8, alpha=0.35 if len(steps) < 500 else 0.2)
    if np.isfinite(std).any():
        axes.fill_between(steps, mean - std, mean + std, color=line.color, alpha=0.18, linewidth=0)
    marker = "o" if len(steps) < 3 else None
    axes.plot(steps, mean, color=line.color, linewidth=line.width, label=line.label, marker=marker, markersize=4)


def _in_words(label: str, found: Curve, unit: str) -> str:
    mean, steps = np.where(found.shared, found.smooth.mean, np.nan), found.steps
    known = np.flatnonzero(np.isfinite(mean))
    if not len(known):
        return f"{label}: the runs share no step."
    first, last = known[0], known[-1]
    return f"{label}: {mean[first]:.3g}{unit} at step {steps[first]}, {mean[last]:.3g}{unit} at step {steps[last]}."


def legend(axes: Any) -> None:
    """Above the axes, in as many columns as fit; long labels cut, since a legend may take no more than its chart."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}\u2026" for label in labels]
    longest = max(map(len, labels))
    columns = min(4, max(1, 75 // (longest + 6)))
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns, fontsize=9)
