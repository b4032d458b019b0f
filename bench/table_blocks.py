"""The READMEs' tables, each made from the newest results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from result_files import NOT_YET, Results, formatted, passed_stages


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    head, *body = ("".join(f"| {cell} " if cell else "| " for cell in line) + "|\n" for line in (columns, *rows))
    return head + "|---" * len(columns) + "|\n" + "".join(body)


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
        ["accuracy over all questions", percent("accuracy_before"), f"**{percent('accuracy_after')}**"],
        [form, percent("answered_rate_before"), percent("answered_rate_after", spread=False)],
        [among, percent("answered_accuracy_before"), f"**{percent('answered_accuracy_after')}**"],
        ["… with the pictures shuffled between questions", "", percent("answered_accuracy_shuffled_images")],
        ["pass@8, sampled", percent("pass_at_8_before"), ""],
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
    is_bold: bool = False


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
        is_bold=True,
    ),
    Ratio("… 256 new tokens", "bench_sampler", "tokens_per_s_vs_hf, 256 tokens"),
    Ratio("… 50 M parameters, 448 px", "bench_sampler", "tokens_per_s_vs_hf, 50M model, 448 px"),
    Ratio(
        "update, forward + backward, 214-token prompt, G = 8, ragged 1…64 tokens",
        "bench_update",
        "time_vs_naive_ragged",
        "memory_vs_naive_ragged",
        "padded batch",
        is_bold=True,
    ),
    Ratio("… all completions of 64 tokens", "bench_update", "time_vs_naive_full", "memory_vs_naive_full"),
    Ratio("… all of 256", "bench_update", "time_vs_naive_C=256", "memory_vs_naive_C=256"),
    Ratio(
        "LM head's log-probs, V = 151,936, forward + backward",
        "bench_kernels",
        "time_vs_torch",
        "memory_vs_torch",
        "plain torch",
    ),
)


def cpu(results: Results) -> str:
    """Ours against others on a CPU."""
    return markdown(["what", "against", "times faster", "memory"], [_ratio_cells(row, results) for row in CPU_ROWS])


def _ratio_cells(row: Ratio, results: Results) -> list[str]:
    found = results.newest(row.bench, ratio=row.time)
    if found is None:
        return [row.what, row.against, NOT_YET, ""]
    link = f" ([record](bench/results/{found.name}))" if row.against else ""
    memory = found.ratio(row.memory)
    share = "" if memory is None else f"1/{memory:.1f}" if memory < 10 else f"1/{memory:.0f}"
    time = f"{found.ratio(row.time):.2f}"
    return [row.what + link, row.against, f"**{time}**" if row.is_bold else time, share]


def gpu(results: Results) -> str:
    """The numbers to reach on an H200 beside those measured."""
    suite = results.newest_on_gpu()
    stages = passed_stages(suite)
    decode = "decode_ms_per_step"
    rows = [
        ["the paper's step, 8 prompts × 8 × 700 tokens", "≤ 2.2 s"],
        ["… against plain transformers and torch", "–"],
        ["… against TRL 1.16", "–"],
        ["decode step, prompts of 700 and 324 new tokens, B = 64", "≤ 1.6 ms"],
        ["… B = 256", "≤ 2.3 ms"],
        ["LM head, forward + backward, 16,384 tokens", "≤ 36 ms"],
        ["… peak memory at 32,768 tokens", "≤ 9.96 GB"],
        ["weight sync", "≤ 5 ms"],
    ]
    measured = [
        formatted("{:.2f} s", stages, "step", "step_seconds", "median"),
        formatted("{:.1f} times faster", stages, "step_plain", "ratios", "step_time_vs_plain"),
        formatted("{:.1f} times faster", stages, "step_trl", "ratios", "step_time_vs_trl"),
        formatted("{:.2f} ms", stages, "rollout", "B=64", decode),
        formatted("{:.2f} ms", stages, "rollout", "B=256", decode),
        formatted("{:.1f} ms", stages, "head", "head", None, "fastgrpo", "ms"),
        gigabytes(stages, "fastgrpo"),
        formatted("{:.1f} ms", stages, "sync", "ms"),
    ]
    where = suite.record["device"] if suite else "one H200"
    table = markdown(
        [f"Qwen2-VL-2B's shape, bf16, {where}", "to reach", "measured"],
        [[*row, figure] for row, figure in zip(rows, measured, strict=True)],
    )
    if suite is None:
        never = "CUDA graphs and torch's variable-length attention are written and were never run"
        return f"{table}\n**Nothing has been measured on a GPU yet**: {never}.\n"
    return f"{table}\n[Record](bench/results/{suite.name}): commit {suite.record['commit']}.\n"


def gigabytes(stages: dict[str, Any], side: str) -> str:
    """The head's peak memory."""
    peaks = {name: peak / 1e9 for name, peak in stages.get("memory", {}).get("peak_bytes", {}).items()}
    return formatted("{:.2f} GB", peaks, f"head, {side}")


def kernels(results: Results) -> str:
    """The ops, on a GPU and on a CPU."""
    stages = passed_stages(results.newest_on_gpu())
    ops = [("head", "loss", "grpo_loss"), ("decode_ops", "decode_attention", "decode_attention")]
    ops += [("decode_ops", "rope", "rope_and_cache"), ("decode_ops", "sample", "sample")]
    head = (stages, "head", "head", None, "fastgrpo")
    rows = [
        ["one H200: head, forward + backward, T = 16,384, H = 1536", "≤ 36 ms", formatted("{:.1f} ms", *head, "ms")],
        ["… forward alone", "floor 9.7 ms", formatted("{:.1f} ms", *head, "forward_ms")],
        ["… peak at 32,768 tokens, logits kept", "≤ 9.96 GB", gigabytes(stages, "fastgrpo")],
        ["… recomputed", "≤ 1.07 GB", gigabytes(stages, "fastgrpo_recompute")],
        *(
            [f"… `{name}`", "–", formatted("{:.3f} ms", stages, stage, op, None, "fastgrpo", "ms")]
            for stage, op, name in ops
        ),
        *_cpu_kernels(results),
    ]
    return markdown(["what", "reach", "measured"], rows)


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


BLOCKS: dict[str, Callable[[Results], str]] = {
    "demo": demo,
    "cpu": cpu,
    "gpu": gpu,
    "kernels": kernels,
    "scaling": scaling,
}
"""By the name in the marker."""
