"""The READMEs' tables, each made from the newest results."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import gpu_tables
from result_files import NOT_YET, ResultFile, Results, markdown


def demo(results: Results) -> str:
    """What the demo learns, over its seeds."""
    runs: list[dict[str, Any]] = [one.record["figures"] for one in results.files if one.record["bench"] == "demo"]

    def percent(name: str, *, spread: bool = True, digits: int = 1) -> str:
        values = [100 * run[name] for run in runs]
        with_spread = f" ± {stdev(values):.{digits}f}" if spread and len(set(values)) > 1 else ""
        return f"{fmean(values):.{digits}f}{with_spread} %"

    def by_task(when: str) -> str:
        tasks = ("Count", "Relation", "Depth")
        return " · ".join(f"{100 * fmean(run['accuracy_by_task'][t][when] for run in runs):.0f}" for t in tasks) + " %"

    def mean(name: str) -> str:
        return f"{fmean(run[name] for run in runs):.1f}"

    form = "answered in the form `<think>…</think> <answer>…</answer>`"
    among = f"accuracy among those answered (guessing: {100 * runs[0]['chance']:.1f} %)"
    reflective = (percent(f"reflection_rate_{when}", digits=0) for when in ("before", "after"))
    rows = [
        ["accuracy, as a person reads the answers", percent("accuracy_before"), f"**{percent('accuracy_after')}**"],
        ["accuracy by the reward's grader", percent("accuracy_strict_before"), percent("accuracy_strict_after")],
        [form, percent("answered_rate_before"), percent("answered_rate_after", spread=False)],
        [among, percent("answered_accuracy_before"), f"**{percent('answered_accuracy_after')}**"],
        ["… with the pictures shuffled between questions", "", percent("answered_accuracy_shuffled_images")],
        [f"pass@8, sampled (guessing: {100 * _guessing(runs[0], tries=8):.1f} %)", percent("pass_at_8_before"), ""],
        ["counting · left, right, above, below · nearer, farther", by_task("before"), by_task("after")],
        ["responses with a reflective phrase", *reflective],
        ["response length, tokens", mean("mean_length_before"), mean("mean_length_after")],
    ]
    table = markdown([f"400 held-out questions, greedy, mean ± std of {len(runs)} seeds", "before", "after"], rows)
    seconds, speeds = ([run[name] for run in runs] for name in ("wall_s", "tokens_per_s"))
    times = f"{min(seconds):.0f} to {max(seconds):.0f} s with all scoring on 2 cores"
    speed = f"{round(min(speeds), -2):,.0f} to {round(max(speeds), -2):,.0f} tokens/s"
    seeds = ", ".join(f"`{run['seed']}`" for run in runs[1:])
    return (
        f"{table}\n{runs[0]['steps']} steps of 64 completions, {times}, {speed}\n"
        f"([figures](bench/results): `make demo SEED={runs[0]['seed']}`, {seeds}).\n"
    )


def _guessing(run: dict[str, Any], *, tries: int) -> float:
    """Share of questions that so many even guesses get right; questions of a type have equally many options here."""
    tasks = run["accuracy_by_task"].values()
    return sum(t["count"] * (1 - (1 - t["chance"]) ** tries) for t in tasks) / sum(t["count"] for t in tasks)


@dataclass(frozen=True)
class Ratio:
    """A row: ours against theirs."""

    what: str
    bench: str
    time: str
    """The ratio's name in the record, like `memory`."""
    memory: str = ""
    against: str = ""
    """Empty in rows that go on from the one above; such rows link no record either."""
    figures: tuple[str, ...] = ()
    """Where the record's figures hold what is told of the row: its size and its spread."""
    spreads: tuple[str, str] = ("", "")
    """The names there of (slowest − fastest) ÷ median of ours and of theirs; a dot is a step down."""
    is_bold: bool = False


PACKED = ("packed_spread", "naive_spread")
CPU_ROWS = (
    Ratio(
        "whole step, 336-px picture, G = 8, exactly 64 new tokens, beta 0.04",
        "bench_step",
        "step_time_vs_trl",
        "peak_memory_vs_trl",
        "TRL 1.16",
        is_bold=True,
    ),
    Ratio(
        "rollout, the same sizes",
        "bench_sampler",
        "tokens_per_s_vs_hf",
        "peak_memory_vs_hf",
        "HF `generate`",
        ("64 tokens",),
        ("spread.ours", "spread.hf"),
        is_bold=True,
    ),
    Ratio(
        "… 256 new tokens",
        "bench_sampler",
        "tokens_per_s_vs_hf, 256 tokens",
        figures=("256 tokens",),
        spreads=("spread.ours", "spread.hf"),
    ),
    Ratio(
        "… 448 px",
        "bench_sampler",
        "tokens_per_s_vs_hf, 50M model, 448 px",
        figures=("50M model, 448 px",),
        spreads=("spread.ours", "spread.hf"),
    ),
    Ratio(
        "update, forward + backward, 214-token prompt, G = 8, ragged 1…64 tokens",
        "bench_update",
        "time_vs_naive_ragged",
        "memory_vs_naive_ragged",
        "padded batch",
        ("ragged",),
        PACKED,
        is_bold=True,
    ),
    Ratio(
        "… all completions of 64 tokens",
        "bench_update",
        "time_vs_naive_full",
        "memory_vs_naive_full",
        figures=("full",),
        spreads=PACKED,
    ),
    Ratio(
        "… all of 256",
        "bench_update",
        "time_vs_naive_C=256",
        "memory_vs_naive_C=256",
        figures=("C=256",),
        spreads=PACKED,
    ),
    Ratio(
        "LM head's log-probs, V = 151,936, forward + backward",
        "bench_kernels",
        "time_vs_torch",
        "memory_vs_torch",
        "plain torch",
        ("head", "T=2048 H=256 V=151936 float32"),
        ("fastgrpo.spread", "torch.spread"),
    ),
)


def cpu(results: Results) -> str:
    """Ours against others on a CPU."""
    columns = ["what", "against", "parameters", "threads", "times faster", "spread", "memory"]
    told = (
        "\nSpread: of the factor, least … greatest of the turns; where these were not kept, of the times on each side, "
        "ours : theirs, as (slowest − fastest) ÷ median.\n"
    )
    return markdown(columns, [_ratio_cells(row, results) for row in CPU_ROWS]) + told


def _ratio_cells(row: Ratio, results: Results) -> list[str]:
    found = results.newest(row.bench, ratio=row.time)
    if found is None:
        return [row.what, row.against, "", "", NOT_YET, "", ""]
    link = f" ([record](bench/results/{found.name}))" if row.against else ""
    memory = found.ratio(row.memory)
    share = "" if memory is None else f"1/{memory:.1f}" if memory < 10 else f"1/{memory:.0f}"
    time = f"{found.ratio(row.time):.2f}"
    bold = f"**{time}**" if row.is_bold else time
    return [row.what + link, row.against, _parameters(row, found), _threads(found), bold, _spread(row, found), share]


def _parameters(row: Ratio, found: ResultFile) -> str:
    figures = found.record["figures"]
    count = _at(figures, *row.figures, "parameters") or _at(figures, "parameters")
    return f"{count / 1e6:.1f} M" if count else "–"


def _threads(found: ResultFile) -> str:
    match = re.search(r"(\d+) threads?$", found.record["device"])
    return match[1] if match else "–"


def _spread(row: Ratio, found: ResultFile) -> str:
    figures = found.record["figures"]
    speedup = _at(figures, "speedup")
    if speedup and not row.figures:
        return f"{speedup['low']:.2f} … {speedup['high']:.2f}"
    both = [_at(figures, *row.figures, *name.split(".")) for name in row.spreads]
    return "–" if None in both else " : ".join(f"{100 * one:.0f} %" for one in both)


def _at(figures: Any, *path: str) -> Any:
    """What lies at the end of a path; None where it breaks off."""
    for name in path:
        figures = figures.get(name) if isinstance(figures, dict) else None
    return figures


def kernels(results: Results) -> str:
    """The ops, on a GPU and on a CPU."""
    return markdown(["what", "reach", "measured"], [*gpu_tables.kernel_rows(results), *_cpu_kernels(results)])


CPU_OPS = {
    "loss": "grpo_loss",
    "decode_attention": "decode_attention",
    "attention": "paged_attention",
    "rope": "rope_and_cache",
    "sample": "sample",
}
"""The record's names of the ops, and ours."""


def _cpu_kernels(results: Results) -> list[list[str]]:
    found = results.newest("bench_kernels", ratio="loss_time_vs_torch")
    if found is None:
        return [["2-core CPU", "–", NOT_YET]]
    figures = found.record["figures"]
    head = next(iter(figures["head"].values()))

    def pair(sides: dict[str, Any], what: str, unit: str, scale: float, digits: int) -> str:
        theirs, ours = (f"{sides[side][what] * scale:,.{digits}f} {unit}" for side in ("torch", "fastgrpo"))
        return f"({theirs} : {ours})"

    def time(sides: dict[str, Any]) -> str:
        return f"{sides['torch']['ms'] / sides['fastgrpo']['ms']:.2f} {pair(sides, 'ms', 'ms', 1, 2)}"

    return [
        [
            "2-core CPU, float32, T = 2048, H = 256: plain torch's peak memory over ours",
            "≥ 8",
            f"**{found.ratio('memory_vs_torch'):.1f}** {pair(head, 'peak_bytes', 'MB', 1e-6, 0)}",
        ],
        [
            "the same: plain torch's time over ours",
            "≥ 0.91",
            f"**{found.ratio('time_vs_torch'):.2f}** {pair(head, 'ms', 's', 1e-3, 2)}",
        ],
        # Every shape that was measured, those at which ours is the slower included.
        *(
            [f"… `{name}`, {shape}", "–", time(sides)]
            for op, name in CPU_OPS.items()
            for shape, sides in figures.get(op, {}).items()
        ),
    ]


def scaling(results: Results) -> str:
    """What `bench_scaling.py` says in words, and its plot."""
    found = results.newest("bench_scaling")
    if found is None:
        command = "python bench/bench_scaling.py --device cpu --out bench/results/scaling-cpu.json"
        return f"{NOT_YET.capitalize()}: `{command}`.\n"
    told_so = "".join(f"- {sentence}\n" for sentence in found.record["figures"]["sentences"])
    plot = found.name.replace(".json", ".png")
    return f"{told_so}\n![seconds by phase, log-log](results/{plot})\n\n[Record](results/{found.name})\n"


def families(results: Results) -> str:
    """What `bench_family_speed.py` compared."""
    command = "python bench/bench_family_speed.py --out bench/results/families-cpu.json"
    found = results.newest("bench_family_speed")
    if found is None:
        return f"{NOT_YET.capitalize()}: `{command}`.\n"
    rows = [
        [row["what"], row["against"], f"{row['theirs_s']:.2f} s", f"{row['ours_s']:.2f} s", f"**{row['ratio']:.2f}**"]
        for row in found.record["figures"]["comparisons"]
    ]
    table = markdown(["what", "against", "theirs", "ours", "times faster"], rows)
    return f"{table}\n[Record](../bench/results/{found.name}): `{command}`.\n"


BLOCKS: dict[str, Callable[[Results], str]] = {
    "demo": demo,
    "cpu": cpu,
    "families": families,
    "gpu-state": gpu_tables.state,
    "gpu": gpu_tables.speed,
    "kernels": kernels,
    "scaling": scaling,
}
"""By the name in the marker."""
