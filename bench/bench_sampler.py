"""Rollouts: `SamplerEngine` against HF `generate` and, on a CPU, `generate_batch` (continuous batching).

All have the same model, dtype, threads, lengths of prompts and number of tokens.

    python bench/bench_sampler.py --device cpu

HF gets what a GRPO trainer gives it: a left-padded batch that holds every prompt G times, pictures included. Both
sides draw at temperature 1 with image tokens suppressed and no end token, so exactly as many tokens as asked for. Only
ours also returns log-probs. Decode alone is on HF's side the time of N tokens less that of one token, on ours that of
its spans. `generate_batch` takes no pictures, so it reads as many words, without a vision tower. On a GPU the model is
of Qwen2-VL-2B's shape.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from fastgrpo_profiling.roofline import measure_ceilings
from fastgrpo_profiling.span import SpanRecorder, record
from harness import Result, compute_dtype, parser, print_table
from sides.rollout import batching_rollout, build_engine, hf_rollout, our_rollout
from timing import in_fresh_process, paired_ratio, paired_seconds, peak_bytes, spread
from torch import Tensor
from workloads import Workload, build_model, build_prompts, rollouts_of

from fastgrpo.plain.engine import vision_inputs
from fastgrpo.sampler.decoder import KVCache
from fastgrpo.sampler.engine import SamplerEngine

CHECKED_TOKENS = 32
ERROR_OVER_HF, TOLERANCE = 1.5, 1e-4
"""How many times the error of HF's own forward pass in the same dtype our log-probs may have, and beyond, in nats."""
THEIRS = {"hf": hf_rollout, "batching": batching_rollout}
SLOW = "batching"
"""Takes part in half of the rounds."""
COLUMNS = ("workload", "HF tokens/s", "ours tokens/s", "times faster", "HF ms/step", "ours", "floor")


@dataclass
class Timed:
    """Seconds of both sides' rollouts, call by call."""

    workload: Workload
    whole: dict[str, list[float]] = field(default_factory=dict)
    decode: dict[str, list[float]] = field(default_factory=dict)

    def take(self, sides: Sequence[str], model: Any, engine: SamplerEngine, *, rounds: int) -> None:
        """Times these sides in turn, warm. Our spans' seconds are on a GPU the device's."""
        workload, tokens, device = self.workload, self.workload.new_tokens, model.device.type
        recorders = []

        def ours() -> None:
            recorders.append(SpanRecorder(on_device=device == "cuda"))
            with record(recorders[-1]):
                our_rollout(engine, workload, tokens)

        calls: dict[str, Any] = {"ours": ours} if "ours" in sides else {}
        theirs = {side: draw for side, draw in THEIRS.items() if side in sides}
        for side, draw in theirs.items():
            calls[side] = partial(draw, model, workload, tokens)
            calls[f"{side}, one token"] = partial(draw, model, workload, 1)
        if "ours" in sides:
            ours()
        for draw in theirs.values():
            draw(model, workload, 2)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            some = {name: call for name, call in calls.items() if number < rounds // 2 or not name.startswith(SLOW)}
            for name, seconds in paired_seconds(some, rounds=1, warmup=0, device=device).items():
                times[name] += seconds
        self.whole |= {side: times[side] for side in sides}
        for side in theirs:
            one = times[f"{side}, one token"]
            self.decode[side] = [whole - first for whole, first in zip(times[side], one, strict=True)]
        if "ours" in sides:
            spans = [recorder.totals for recorder in recorders[-rounds:]]
            self.decode["ours"] = [sum(t[f"rollout/{part}"].seconds for part in ("decode", "check")) for t in spans]

    @property
    def figures(self) -> dict[str, Any]:
        """By side, for JSON."""
        return {
            "seconds": {side: median(seconds) for side, seconds in self.whole.items()},
            "spread": {side: spread(seconds) for side, seconds in self.whole.items()},
            "tokens_per_s": {side: self.tokens / median(seconds) for side, seconds in self.whole.items()},
            # The first token comes with the prefill.
            "decode_ms_per_step": {
                side: 1e3 * median(seconds) / (self.workload.new_tokens - 1) for side, seconds in self.decode.items()
            },
        }

    @property
    def tokens(self) -> int:
        return self.workload.rows * self.workload.new_tokens

    def ratios(self, name: str, key: str = "") -> dict[str, float]:
        """Theirs over ours, once both are there."""
        found = {}
        for side in self.whole.keys() & THEIRS if "ours" in self.whole else ():
            rounds = slice(min(len(self.whole[name]) for name in (side, "ours")))
            pairs = [(times[side][rounds], times["ours"][rounds]) for times in (self.whole, self.decode)]
            whole, decode = (paired_ratio(*pair) for pair in pairs)
            name_of_whole = key if key and side == "hf" else f"tokens_per_s_vs_{side}, {name}"
            found |= {name_of_whole: whole, f"decode_tokens_per_s_vs_{side}, {name}": decode}
        return found

    def row(self, name: str, floor: float) -> list[Any]:
        """Of the table."""
        found, ratio = self.figures, self.ratios(name).get(f"tokens_per_s_vs_hf, {name}")
        speeds, steps = found["tokens_per_s"], found["decode_ms_per_step"]
        return [name, speeds.get("hf"), speeds["ours"], ratio, steps.get("hf"), steps["ours"], floor]


@torch.no_grad()
def logprob_errors(model: Any, engine: SamplerEngine, workload: Workload) -> dict[str, float]:
    """Mean |log-prob − exact| in nats, of our sampled tokens as we gave them and as HF's forward pass has them.

    Exact is the same weights in float32, or float64 for a float32 model.
    """
    one = replace(workload, prompts=1)
    ((_, completions),) = our_rollout(engine, one, CHECKED_TOKENS).items()
    prompt = build_prompts(one)[0]
    tokens = torch.stack([completion.token_ids for completion in completions]).to(model.device)  # [G, C]
    ids = torch.cat([prompt.input_ids.to(model.device).expand(len(tokens), -1), tokens], dim=1)

    def of(judge: Any) -> Tensor:
        logits = judge(input_ids=ids, **vision_inputs(judge, [prompt] * len(ids), ids), use_cache=False).logits
        scores = logits[:, -CHECKED_TOKENS - 1 : -1].double().log_softmax(dim=-1)
        return scores.gather(2, tokens[..., None]).squeeze(2)

    exact = of(copy.deepcopy(model).to(torch.float32 if model.dtype == torch.bfloat16 else torch.float64))
    found = {"ours": torch.stack([completion.logprobs for completion in completions]).to(exact), "hf": of(model)}
    return {name: (logprobs - exact).abs().mean().item() for name, logprobs in found.items()}


def are_right(errors: dict[str, float]) -> bool:
    """Whether our log-probs are about as exact as HF's own."""
    return errors["ours"] <= ERROR_OVER_HF * errors["hf"] + TOLERANCE


def floor_ms(engine: SamplerEngine, workload: Workload, bytes_per_s: float) -> float:
    """Milliseconds to read the weights once and the cache, prompts shared, at the length of half the completion."""
    decoder = engine.decoder
    weights = [decoder.head_weight] + [w for layer in decoder.layers for w in vars(layer).values()]
    token = KVCache.page_bytes(decoder.shape, 1, decoder.dtype)
    prompts = sum(len(p.input_ids) for p in build_prompts(workload))
    read = sum(w.nbytes for w in weights) + token * (prompts + workload.rows * workload.new_tokens / 2)
    return 1e3 * read / bytes_per_s


def without_graphs(model: Any, workload: Workload) -> float:
    """Seconds of a rollout whose decode steps are launched one kernel at a time."""
    engine = build_engine(model, cuda_graphs=False)
    call = {"ours": lambda: our_rollout(engine, workload, workload.new_tokens)}
    return median(paired_seconds(call, rounds=1, device=model.device.type)["ours"])


def peak_memory(side: str, device: str) -> int:
    """Bytes at the peak of one rollout above what the model holds; for ours, its own weights and cache included."""
    workload = next(iter(rollouts_of(device, rows=(64,)).values()))
    model = build_model(workload.model, device)
    if side == "hf":
        return peak_bytes(lambda: hf_rollout(model, workload, workload.new_tokens), device)
    return peak_bytes(lambda: our_rollout(build_engine(model), workload, workload.new_tokens), device)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", metavar="NAME", help="one workload of the table")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads, of both sides")
    arguments.add_argument(
        "--peers", nargs="*", choices=THEIRS, default=list(THEIRS), help="the other sides; all where they can run"
    )
    arguments.add_argument("--peak-memory", choices=("hf", "ours"), help="print one side's peak and leave")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_memory:
        print(peak_memory(options.peak_memory, options.device))
        return 0
    device, result, rows = options.device, Result("bench_sampler", options.device), []
    bandwidth = measure_ceilings(device, compute_dtype(device)).bytes_per_s
    for name, workload in rollouts_of(device).items():
        if options.only not in (None, name):
            continue
        model = build_model(workload.model, device)
        engine, timed = build_engine(model), Timed(workload)
        errors, floor = logprob_errors(model, engine, workload), floor_ms(engine, workload, bandwidth)
        result.checks[f"{name}: log-probs are right"] = are_right(errors)
        sides = ["hf", *(["batching"] if device == "cpu" and workload.model == "4M" else []), "ours"]
        sides = [side for side in sides if side in ("ours", *options.peers)]
        timed.take(sides, model, engine, rounds=workload.rounds)
        result.ratios |= timed.ratios(name, "tokens_per_s_vs_hf" if name == "64 tokens" else "")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        result.figures[name] = {"parameters": parameters, "logprob_errors": errors, "floor_ms_per_step": floor}
        result.figures[name] |= timed.figures
        rows.append(timed.row(name, floor))
    if options.only is None:
        flags = ("--device", device, "--threads", str(options.threads))
        peaks = {side: in_fresh_process(*flags, "--peak-memory", side) for side in ("hf", "ours")}
        result.figures["peak_memory_mib"] = {side: peak / 2**20 for side, peak in peaks.items()}
        result.ratios["peak_memory_vs_hf"] = peaks["hf"] / peaks["ours"]
    print_table("Rollouts", COLUMNS, rows)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
