"""Writes the newest results of `bench/results` into the tables of the READMEs, between their markers.

python bench/tables.py             # rewrites what lies between <!-- bench:NAME --> and <!-- /bench -->
python bench/tables.py --check     # exits 1 where a table and the files disagree
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "kernels/README.md", "bench/README.md")
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
NOT_YET = "not measured yet"
OPS = {"paged_attention": "attention", "rope_and_cache": "rope", "sample": "sample"}
"""Their names in the kernels' benchmark."""
Record = Mapping[str, Any]


class Results:
    """The records of a folder."""

    def __init__(self, folder: Path) -> None:
        self.found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]

    def newest(self, bench: str, *, on_gpu: bool = False, **wanted: Any) -> tuple[Path, Record] | None:
        """The last one of a runner, by the date in it; `wanted`: further fields it must have."""
        fitting = [
            (path, record)
            for path, record in self.found
            if record["bench"] == bench
            and record["device"].startswith("cpu") != on_gpu
            and all(record.get(name) == value for name, value in wanted.items())
        ]
        return max(fitting, key=lambda one: one[1].get("date", ""), default=None)

    def record(self, bench: str) -> Record:
        """The newest on a CPU; empty figures where there is none."""
        found = self.newest(bench)
        return found[1] if found else {"ratios": {}, "figures": {}}

    def gpu_stages(self) -> dict[str, Any]:
        """What the newest suite on a GPU found: figures by stage, of those that passed."""
        found = self.newest("suite", on_gpu=True, scale="full")
        stages = found[1]["stages"] if found else {}
        return {name: stage["figures"] for name, stage in stages.items() if stage["status"] == "passed"}

    def link(self, page: str, bench: str) -> str:
        """To the record, from a page."""
        found = self.newest(bench)
        up = "../" * page.count("/") + "bench/results/"
        return f" ([record]({up}{found[0].name}))" if found else ""


def _times(ratio: float | None, *, bold: bool = False) -> str:
    """A ratio."""
    if ratio is None:
        return NOT_YET
    told = f"{ratio:.2f}"
    return f"**{told}**" if bold else told


def _less(ratio: float | None) -> str:
    """Theirs over ours, as our share of theirs."""
    if ratio is None:
        return ""
    return f"1/{ratio:.1f}" if ratio < 10 else f"1/{ratio:.0f}"


def measured(told: Callable[[], str]) -> str:
    """What `told` finds in the results, or that they do not hold it."""
    try:
        return told()
    except (KeyError, StopIteration):
        return NOT_YET


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head, *body = ("".join(f"| {cell} " if cell else "| " for cell in line) + "|\n" for line in (columns, *rows))
    return head + "|---" * len(columns) + "|\n" + "".join(body)


def demo(results: Results, page: str) -> str:
    """What the demo learns, over its seeds."""
    runs = [record["figures"] for _, record in results.found if record["bench"] == "demo"]

    def of(name: str, *, spread: bool = True, digits: int = 1) -> str:
        values = [100 * run[name] for run in runs]
        with_spread = f" ± {stdev(values):.{digits}f}" if spread and len(set(values)) > 1 else ""
        return f"{fmean(values):.{digits}f}{with_spread} %"

    def by_task(when: str) -> str:
        tasks = ("Count", "Relation", "Depth")
        return " · ".join(f"{100 * fmean(run['accuracy_by_task'][t][when] for run in runs):.0f}" for t in tasks) + " %"

    def mean(name: str) -> str:
        return f"{fmean(run[name] for run in runs):.1f}"

    chance = f"{100 * runs[0]['chance']:.1f}"
    form = "`<think>…</think> <answer>…</answer>`"
    rows = [
        ["accuracy over all questions", of("accuracy_before"), f"**{of('accuracy_after')}**"],
        [f"answered in the form {form}", of("answered_rate_before"), of("answered_rate_after", spread=False)],
        [
            f"accuracy among those answered (guessing: {chance} %)",
            of("answered_accuracy_before"),
            f"**{of('answered_accuracy_after')}**",
        ],
        ["… with the pictures shuffled between questions", "", of("answered_accuracy_shuffled_images")],
        ["pass@8, sampled", of("pass_at_8_before"), ""],
        ["counting · left, right, above, below · nearer, farther", by_task("before"), by_task("after")],
        [
            "responses with a reflective phrase",
            of("reflection_rate_before", digits=0),
            of("reflection_rate_after", digits=0),
        ],
        ["response length, tokens", mean("mean_length_before"), mean("mean_length_after")],
    ]
    head = [f"400 held-out questions, greedy, mean ± std of {len(runs)} seeds", "before", "after"]
    seconds, speeds = ([run[name] for run in runs] for name in ("wall_s", "tokens_per_s"))
    seeds = ", ".join(f"`{run['seed']}`" for run in runs[1:])
    times = f"{min(seconds):.0f} to {max(seconds):.0f} s with all scoring on 2 cores"
    speed = f"{round(min(speeds), -2):,.0f} to {round(max(speeds), -2):,.0f} tokens/s"
    commands = f"`make demo SEED={runs[0]['seed']}`, {seeds}"
    told = f"{runs[0]['steps']} steps of 64 completions, {times}, {speed}\n([figures](bench/results): {commands}).\n"
    return f"{_table(head, rows)}\n{told}"


def cpu(results: Results, page: str) -> str:
    """Ours against others on a CPU."""
    step, sampler, update, kernels = (
        results.record(f"bench_{name}")["ratios"] for name in ("step", "sampler", "update", "kernels")
    )
    # What, link, against, ratio of time, ratio of memory, whether it is the row to look at.
    rows: list[tuple[str, str, str, float | None, float | None, bool]] = [
        (
            "whole step, 336-px picture, G = 8, exactly 64 new tokens, beta 0.04",
            "bench_step",
            "TRL 1.16",
            step.get("step_time_vs_trl"),
            step.get("peak_memory_vs_trl"),
            True,
        ),
        (
            "rollout, the same sizes",
            "bench_sampler",
            "HF `generate`",
            sampler.get("tokens_per_s_vs_hf"),
            sampler.get("peak_memory_vs_hf"),
            True,
        ),
        ("… 256 new tokens", "", "", sampler.get("tokens_per_s_vs_hf, 256 tokens"), None, False),
        ("… 50 M parameters, 448 px", "", "", sampler.get("tokens_per_s_vs_hf, 50M model, 448 px"), None, False),
        (
            "update, forward + backward, 214-token prompt, G = 8, ragged 1…64 tokens",
            "bench_update",
            "padded batch",
            update.get("time_vs_naive_ragged"),
            update.get("memory_vs_naive_ragged"),
            True,
        ),
        (
            "… all completions of 64 tokens",
            "",
            "",
            update.get("time_vs_naive_full"),
            update.get("memory_vs_naive_full"),
            False,
        ),
        ("… all of 256", "", "", update.get("time_vs_naive_C=256"), update.get("memory_vs_naive_C=256"), False),
        (
            "LM head's log-probs, V = 151,936, forward + backward",
            "bench_kernels",
            "plain torch",
            kernels.get("time_vs_torch"),
            kernels.get("memory_vs_torch"),
            False,
        ),
    ]
    cells = [
        [what + (results.link(page, bench) if bench else ""), against, _times(time, bold=bold), _less(memory)]
        for what, bench, against, time, memory, bold in rows
    ]
    return _table(["what", "against", "times faster", "memory"], cells)


def gpu(results: Results, page: str) -> str:
    """The numbers to reach on an H200 beside those measured."""
    stages = results.gpu_stages()
    found = results.newest("suite", on_gpu=True, scale="full")

    def decode(rows: int) -> str:
        return f"{stages['rollout'][f'B={rows}']['decode_ms_per_step']['ours']:.2f} ms"

    def against(side: str) -> str:
        steps = stages[f"step_{side}"]
        return f"{steps[side]['step_seconds']['median'] / steps['ours']['step_seconds']['median']:.1f} times faster"

    rows = [
        [
            "the paper's step, 8 prompts × 8 × 700 tokens",
            "≤ 2.2 s",
            measured(lambda: _step(stages)),
        ],
        ["… against plain transformers and torch", "–", measured(lambda: against("plain"))],
        ["… against TRL 1.16", "–", measured(lambda: against("trl"))],
        ["decode step, prompts of 700 and 324 new tokens, B = 64", "≤ 1.6 ms", measured(lambda: decode(64))],
        ["… B = 256", "≤ 2.3 ms", measured(lambda: decode(256))],
        ["LM head, forward + backward, 16,384 tokens", "≤ 36 ms", measured(lambda: _head(stages, "ms"))],
        [
            "… peak memory at 32,768 tokens",
            "≤ 9.96 GB",
            measured(lambda: _peak(stages, "fastgrpo")),
        ],
        ["weight sync", "≤ 5 ms", measured(lambda: f"{stages['sync']['ms']:.1f} ms")],
    ]
    where = "one H200" if found is None else found[1]["device"]
    table = _table([f"Qwen2-VL-2B's shape, bf16, {where}", "to reach", "measured"], rows)
    if found is None:
        never = "CUDA graphs and torch's variable-length attention are written and were never run"
        return f"{table}\n**Nothing has been measured on a GPU yet**: {never}.\n"
    return f"{table}\n[Record](bench/results/{found[0].name}): commit {found[1]['commit']}.\n"


def _step(stages: Record) -> str:
    return f"{stages['step']['step_seconds']['median']:.2f} s"


def _head(stages: Record, what: str) -> str:
    shape = next(iter(stages["head"]["head"].values()))
    return f"{shape['fastgrpo'][what]:.1f} ms"


def _peak(stages: Record, side: str) -> str:
    return f"{stages['memory']['peak_bytes'][f'head, {side}'] / 1e9:.2f} GB"


def kernels(results: Results, page: str) -> str:
    """The ops, on a GPU and on a CPU."""
    stages = results.gpu_stages()
    figures, ratios = (results.record("bench_kernels")[part] for part in ("figures", "ratios"))

    def first(op: str) -> dict[str, Any]:
        shape: dict[str, Any] = next(iter(figures[op].values()))
        return shape

    def op_time(stage: str, op: str) -> str:
        shape, sides = next(iter(stages[stage][op].items()))
        return f"{1e3 * sides['fastgrpo']['ms']:.0f} µs, {sides['fastgrpo']['of_floor']:.0%} of the floor ({shape})"

    def memory() -> str:
        ours, torch = (first("head")[side]["peak_bytes"] / 1e6 for side in ("fastgrpo", "torch"))
        return f"**{ratios['memory_vs_torch']:.1f}** ({torch:,.0f} MB : {ours:,.0f} MB)"

    def time(op: str, ratio: str, unit: str, scale: float, mark: str = "") -> str:
        ours, torch = (first(op)[side]["ms"] * scale for side in ("fastgrpo", "torch"))
        digits = 2 if unit == "s" else 1
        return f"{mark}{ratios[ratio]:.2f}{mark} ({torch:.{digits}f} {unit} : {ours:.{digits}f} {unit})"

    rows = [
        [
            "one H200: head, forward + backward, T = 16,384, H = 1536",
            "≤ 36 ms",
            measured(lambda: _head(stages, "ms")),
        ],
        ["… forward alone", "floor 9.7 ms", measured(lambda: _head(stages, "forward_ms"))],
        [
            "… peak at 32,768 tokens beyond weights and hidden states, logits kept",
            "≤ 9.96 GB",
            measured(lambda: _peak(stages, "fastgrpo")),
        ],
        [
            "… recomputed",
            "≤ 1.07 GB",
            measured(lambda: _peak(stages, "fastgrpo_recompute")),
        ],
        ["… `grpo_loss`, 65,536 tokens", "–", measured(lambda: op_time("head", "loss"))],
        *([f"… `{name}`", "–", measured(partial(op_time, "decode_ops", op))] for name, op in OPS.items()),
        ["2-core CPU, float32, T = 2048, H = 256: plain torch's peak memory over ours", "≥ 8", measured(memory)],
        [
            "the same: plain torch's time over ours",
            "≥ 0.91",
            measured(lambda: time("head", "time_vs_torch", "s", 1e-3, "**")),
        ],
        [
            "2-core CPU, `grpo_loss`, 65,536 tokens: plain torch's time, without metrics, over ours with them",
            "–",
            measured(lambda: time("loss", "loss_time_vs_torch", "ms", 1.0)),
        ],
    ]
    return _table(["what", "reach", "measured"], rows)


def scaling(results: Results, page: str) -> str:
    """What bench_scaling.py says in words."""
    found = results.newest("bench_scaling")
    if found is None:
        return f"{NOT_YET.capitalize()}: `python bench/bench_scaling.py --device cpu`.\n"
    sentences = found[1]["figures"]["sentences"]
    return "".join(f"- {sentence}\n" for sentence in sentences) + f"\n[Record](results/{found[0].name})\n"


BLOCKS: dict[str, Callable[[Results, str], str]] = {
    "demo": demo,
    "cpu": cpu,
    "gpu": gpu,
    "kernels": kernels,
    "scaling": scaling,
}


def rewritten(text: str, results: Results, page: str) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: a marker that names no table.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"{page}: bench:{match[2]} is no table; there are {', '.join(BLOCKS)}.")
        return match[1] + BLOCKS[match[2]](results, page) + match[4]

    return BLOCK.sub(block, text)


def main() -> int:
    arguments = argparse.ArgumentParser(description="Writes the newest results into the READMEs' tables.")
    arguments.add_argument("--check", action="store_true", help="change nothing; exit 1 where they disagree")
    arguments.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help=argparse.SUPPRESS)
    arguments.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    results, stale = Results(options.results), []
    for page in PAGES:
        path = options.root / page
        text = path.read_text()
        new = rewritten(text, results, page)
        if new != text:
            stale.append(page)
            if not options.check:
                path.write_text(new)
    if stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
