"""Rollouts by batch size, ours against HF `generate`, with and without CUDA graphs, beside a decode step's floor."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from bench_sampler import (
    TINY,
    Workload,
    build_engine,
    build_model,
    build_prompts,
    floor_ms,
    graphs_off,
    hf_rollout,
    our_rollout,
    paper_workload,
)
from fastgrpo_profiling.roofline import measure_ceilings
from fastgrpo_profiling.span import SpanRecorder, record
from harness import Result, compute_dtype, print_table
from timing import paired_seconds
from torch import Tensor

from fastgrpo.plain.engine import vision_inputs
from fastgrpo.sampler.engine import SamplerEngine
from stages import Task, costs_only

WITHOUT_GRAPHS = "B=64"
"""The batch that is also decoded without CUDA graphs, which takes long."""
CHECKED_TOKENS = 32
ERROR_OVER_HF, TOLERANCE = 1.5, 1e-4
"""How many times the error of HF's own forward pass in the same dtype our log-probs may have, and beyond, in nats."""


def run(task: Task) -> Iterator[Result]:
    """Log-probs against a forward pass in a wider dtype; then times, smallest batch first."""
    scale, device = task.scale, task.device
    result = Result("rollout", device)
    workloads = workloads_of(task)
    smallest = next(iter(workloads.values()))
    model = build_model(smallest.model, device)
    engine = build_engine(model)
    errors = logprob_errors(model, engine, smallest)
    result.figures["logprob_errors"] = errors
    result.checks["log-probs are right"] = errors["ours"] <= ERROR_OVER_HF * errors["hf"] + TOLERANCE
    if not result.passed:
        print(f"Not timed: log-probs {errors['ours']:.2g} nats off, HF's own {errors['hf']:.2g}")
        yield result
        return
    bandwidth, rows = measure_ceilings(device, compute_dtype(device)).bytes_per_s, []
    for name, workload in workloads.items():
        figures = result.figures[name] = {"floor_ms_per_step": floor_ms(engine, workload, bandwidth)}
        with costs_only(result, name):
            figures |= our_figures(engine, workload, device, rounds=3 if scale == "full" else 1)
        yield result
        with costs_only(result, f"{name}, HF"):
            figures |= {f"hf_{key}": value for key, value in hf_figures(model, workload, device).items()}
        if "decode_ms_per_step" in figures and "hf_seconds" in figures:
            result.ratios[f"tokens_per_s_vs_hf, {name}"] = figures["hf_seconds"] / figures["seconds"]
            steps = [figures[f"{side}decode_ms_per_step"] for side in ("hf_", "")]
            result.ratios[f"decode_vs_hf, {name}"] = steps[0] / steps[1]
            rows.append([name, *steps, figures["floor_ms_per_step"], result.ratios[f"tokens_per_s_vs_hf, {name}"]])
        yield result
    if WITHOUT_GRAPHS in workloads and device == "cuda":
        with costs_only(result, "without graphs"):
            result.figures[WITHOUT_GRAPHS] |= graphs_off(model, workloads[WITHOUT_GRAPHS])
        yield result
    print_table("Decode, ms a step", ["workload", "HF", "ours", "floor", "rollout, times faster"], rows)


def workloads_of(task: Task) -> dict[str, Workload]:
    """Groups of 8; 700-token prompts and 324 new tokens on a GPU."""
    if task.scale == "full":
        return {f"B={rows}": paper_workload(rows) for rows in task.rows}
    small = replace(TINY, prompts=1, patches=8)
    if task.scale == "smoke":
        return {"B=8": replace(small, new_tokens=6)}
    return {"B=8": replace(small, new_tokens=24), "B=32": replace(small, new_tokens=24, prompts=4)}


@torch.no_grad()
def logprob_errors(model: Any, engine: SamplerEngine, workload: Workload) -> dict[str, float]:
    """Mean |log-prob − exact| in nats, of our sampled tokens as we gave them and as HF's forward pass has them.

    Exact is the same weights in float32, or float64 for a float32 model.
    """
    ((_, completions),) = our_rollout(engine, replace(workload, prompts=1), CHECKED_TOKENS).items()
    prompt = build_prompts(workload)[0]
    tokens = torch.stack([completion.token_ids for completion in completions]).to(model.device)  # [G, C]
    ids = torch.cat([prompt.input_ids.to(model.device).expand(len(tokens), -1), tokens], dim=1)

    def of(judge: Any) -> Tensor:
        logits = judge(input_ids=ids, **vision_inputs(judge, [prompt] * len(ids), ids), use_cache=False).logits
        scores = logits[:, -CHECKED_TOKENS - 1 : -1].double().log_softmax(dim=-1)
        return scores.gather(2, tokens[..., None]).squeeze(2)

    exact = of(copy.deepcopy(model).to(torch.float32 if model.dtype == torch.bfloat16 else torch.float64))
    found = {"ours": torch.stack([completion.logprobs for completion in completions]).to(exact), "hf": of(model)}
    return {name: (logprobs - exact).abs().mean().item() for name, logprobs in found.items()}


def our_figures(engine: SamplerEngine, workload: Workload, device: str, *, rounds: int) -> dict[str, Any]:
    """Seconds of whole rollouts, and by span: on a GPU the device's, from the first kernel of a span to its last."""
    tokens, recorders = workload.new_tokens, []

    def rollout() -> None:
        recorders.append(SpanRecorder(on_device=device == "cuda"))
        with record(recorders[-1]):
            our_rollout(engine, workload, tokens)

    seconds = median(paired_seconds({"ours": rollout}, rounds=rounds, device=device)["ours"])
    timed = [recorder.totals for recorder in recorders[-rounds:]]
    spans = {name: median(one[name].seconds for one in timed) for name in timed[0]}
    return {
        "seconds": seconds,
        "tokens_per_s": workload.rows * tokens / seconds,
        "spans": spans,
        # The first token comes with the prefill.
        "decode_ms_per_step": 1e3 * spans["rollout/decode"] / (tokens - 1),
    }


def hf_figures(model: Any, workload: Workload, device: str) -> dict[str, Any]:
    """Seconds of one whole rollout, and of one token, hence milliseconds of a decode step."""
    tokens = workload.new_tokens
    hf_rollout(model, workload, 2)
    calls = {"whole": lambda: hf_rollout(model, workload, tokens), "one": lambda: hf_rollout(model, workload, 1)}
    taken = {name: t[0] for name, t in paired_seconds(calls, rounds=1, warmup=0, device=device).items()}
    return {
        "seconds": taken["whole"],
        "one_token_seconds": taken["one"],
        "tokens_per_s": workload.rows * tokens / taken["whole"],
        "decode_ms_per_step": 1e3 * (taken["whole"] - taken["one"]) / (tokens - 1),
    }
