"""The charts of the report, each with a caption that says what to look for."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastgrpo.report.curves import time_shares
from fastgrpo.report.plots import BEFORE, INK, MUTED, SERIES, Chart, Line, Panel, legend, panels, render
from fastgrpo.report.run import Floats, Run, is_supervised

SMALL_SPAN = 1
"""Percent of a step's time."""
SMALL_SPANS = "small spans"
_WIDE, _TALL = (5.0, 2.9), (5.0, 3.7)
"""Inches: a chart in one of the page's two columns."""


def curves(runs: Sequence[Run]) -> list[Chart]:
    """What training did to the model, step by step; charts of what no run logged are left out."""
    return [chart for draw in (loss, reward, response_length, reflection, policy_drift) if (chart := draw(runs))]


def timing(runs: Sequence[Run]) -> list[Chart]:
    """What a step cost."""
    return [chart for draw in (step_time, time_spent) if (chart := draw(runs))]


def loss(runs: Sequence[Run]) -> Chart | None:
    """The loss of supervised runs; that of reinforcement says nothing by itself."""
    supervised = [run for run in runs if is_supervised(run.config)]
    caption = "Mean of minus the log-prob of a target token, on the step's training rows."
    return panels(supervised, "loss", _WIDE, [Panel([Line("loss", "loss", INK, 2.0)], "nats")], caption, "Loss")


def reward(runs: Sequence[Run]) -> Chart | None:
    """The total reward, and each reward function's."""
    names = dict.fromkeys(name for run in runs for name in run.metrics.columns)
    functions = [name for name in names if name.startswith("rewards/") and name.endswith("/mean")]
    lines = [Line("reward", "total", INK, 2.2)]
    for name, color in zip(functions, [*SERIES] * len(functions), strict=False):
        lines.append(Line(name, name.removeprefix("rewards/").removesuffix("/mean"), color))
    caption = (
        "Mean reward of a step, in total and by function. Where format rises to its limit while accuracy stays flat, "
        "the form of an answer was learned and nothing else."
    )
    return panels(runs, "reward", _TALL, [Panel(lines, "mean reward")], caption, "Reward")


def response_length(runs: Sequence[Run]) -> Chart | None:
    """Tokens of a completion, and the share cut off at the limit."""
    length = Panel(
        [Line("completions/mean_length", "mean", SERIES[0], 2.0)],
        "tokens",
        band=("completions/min_length", "completions/max_length"),
        from_zero=True,
        height=2.2,
    )
    clipped = Panel([Line("completions/clipped_ratio", "cut off", SERIES[1])], "cut off", percent=True, from_zero=True)
    caption = (
        "Tokens of a response; the band reaches from each step's shortest to its longest, not smoothed. Below, the "
        "share cut off at the limit. Longer is not better by itself: read it with accuracy."
    )
    return panels(runs, "length", _TALL, [length, clipped], caption, "Response length")


def reflection(runs: Sequence[Run]) -> Chart | None:
    """Share of completions with a reflective phrase."""
    panel = Panel(
        [Line("reflection_rate", "reflective", SERIES[3], 2.0)],
        "of completions",
        percent=True,
        from_zero=True,
    )
    caption = (
        "Completions that hold a reflective phrase (\u201cwait\u201d, \u201clet me check\u201d, \u2026). "
        "The literature calls a lasting rise, with accuracy, the aha moment; a mere habit of phrase looks the same."
    )
    return panels(runs, "reflection", _WIDE, [panel], caption, "Reflective phrases")


def policy_drift(runs: Sequence[Run]) -> Chart | None:
    """KL from the reference model, and entropy."""
    kl = Panel([Line("kl", "KL", SERIES[4])], "KL, nats", from_zero=True)
    entropy = Panel([Line("entropy", "entropy", SERIES[2])], "entropy, nats", from_zero=True)
    caption = (
        "KL divergence from the starting model (logged when beta > 0) and mean token entropy. KL should rise slowly; "
        "entropy falling to zero means exploration has ended."
    )
    return panels(runs, "drift", _WIDE, [kl, entropy], caption, "Policy drift")


def health(runs: Sequence[Run]) -> list[Chart]:
    """Small charts of what to check when a run went wrong."""
    small = [
        ("grad", "grad_norm", "gradient norm", "L2 norm", SERIES[0], False, "A spike may come before a collapse."),
        ("lr", "learning_rate", "learning rate", "rate", SERIES[2], False, "The schedule as it was applied."),
        (
            "nosignal",
            "frac_reward_zero_std",
            "no signal",
            "of groups",
            SERIES[1],
            True,
            "Groups whose rewards are all equal teach nothing.",
        ),
        (
            "mismatch",
            "sampling/sampling_logp_difference/mean",
            "log-prob gap",
            "nats",
            SERIES[4],
            False,
            "Sampler against policy; it should stay near rounding.",
        ),
        (
            "accepted",
            "sampling/accepted_per_step",
            "speculation",
            "tokens a step",
            SERIES[3],
            False,
            "Tokens that a completion gained in a decode step.",
        ),
    ]
    charts = [
        panels(
            runs, name, (3.1, 2.1), [Panel([Line(metric, label, color)], unit, percent=percent, from_zero=percent)],
            caption, label.capitalize(),
        )
        for name, metric, label, unit, color, percent, caption in small
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def step_time(runs: Sequence[Run]) -> Chart | None:
    """Seconds a step took."""
    panel = Panel([Line("step_time", "step time", SERIES[0])], "seconds", from_zero=True, cut_outliers=True)
    caption = "Wall time of each step, cut at 2.5 times the median (warm-up, saves). Longer responses take longer."
    return panels(runs, "steptime", _WIDE, [panel], caption, "Step time")


def time_spent(runs: Sequence[Run]) -> Chart | None:
    """Stacked shares of the step by span."""
    shares = time_shares(runs)
    if shares is None:
        return None
    total = np.sum(list(shares.seconds.values()), axis=0)
    fractions = _merge_small(
        {name: 100 * values / np.where(total > 0, total, 1.0) for name, values in shares.seconds.items()}
    )

    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        bottom = np.zeros(len(total))
        for i, (name, values) in enumerate(fractions.items()):
            color = {"other": BEFORE, SMALL_SPANS: MUTED}.get(name, SERIES[i % len(SERIES)])
            axes.stairs(bottom + values, shares.edges, baseline=bottom, fill=True, color=color, alpha=0.85, label=name)
            bottom = bottom + values
        axes.set_xlim(shares.edges[0], shares.edges[-1])
        axes.set_ylim(0, 100)
        axes.set_ylabel("of the step")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        legend(axes)
        said = ", ".join(f"{name} {values.mean():.0f} %" for name, values in fractions.items())
        return f"Share of step time by span, mean over training: {said}."

    caption = (
        f"Where each step's time went; spans under {SMALL_SPAN} %, and those behind the {len(SERIES)} largest, are "
        "drawn as one. \u201cother\u201d is step time that no span covers: it should stay thin."
    )
    return render("timeshares", "Time by span", _WIDE, draw, caption)


def _merge_small(fractions: dict[str, Floats]) -> dict[str, Floats]:
    """Spans under `SMALL_SPAN` percent on average, and those without a colour, as one, before what no span covers."""
    means = sorted(((values.mean(), name) for name, values in fractions.items() if name != "other"), reverse=True)
    small = [name for place, (mean, name) in enumerate(means) if mean < SMALL_SPAN or place >= len(SERIES)]
    if len(small) < 2 and len(means) <= len(SERIES):
        return fractions
    kept = {name: values for name, values in fractions.items() if name not in (*small, "other")}
    rest = {name: fractions[name] for name in ("other",) if name in fractions}
    return {**kept, SMALL_SPANS: np.sum([fractions[name] for name in small], axis=0), **rest}
