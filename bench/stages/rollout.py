"""Rollouts by batch size, ours against HF `generate`, with and without CUDA graphs, beside a decode step's floor."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from bench_sampler import (
    CUDA_WORKLOADS,
    TINY,
    Workload,
    build_engine,
    build_model,
    build_prompts,
    floor_ms,
    graphs_off,
    hf_rollout,
    our_rollout,
)
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, paired_seconds, print_table
from torch import Tensor

from fastgrpo.plain.engine import vision_inputs
from fastgrpo.sampler.engine import SamplerEngine
from stages.ceilings import compute_dtype

WITHOUT_GRAPHS = "B=64"
"""The batch that is also decoded without CUDA graphs, which takes long."""
CHECKED_TOKENS = 32
ERROR_OVER_HF, TOLERANCE = 1.5, 1e-4
"""How many times the error of HF's own forward pass in the same dtype our log-probs may have, and beyond, in nats."""


def run(scale: str, device: str) -> Iterator[Result]:
    """Log-probs against a forward pass in a wider dtype; then times, smallest batch first."""
    result = Result("rollout", device)
    workloads = workloads_of(scale)
    model = build_model(next(iter(workloads.values())).model, device)
    engine = build_engine(model)
    errors = logprob_errors(model, engine, next(iter(workloads.values())))
    result.figures["logprob_errors"] = errors
    result.checks["log-probs are right"] = errors["ours"] <= ERROR_OVER_HF * errors["hf"] + TOLERANCE
    if not result.passed:
        print(f"Not timed: log-probs {errors['ours']:.2g} nats off, HF's own {errors['hf']:.2g}")
        yield result
        return
    bandwidth, rows = measure_ceilings(device, compute_dtype(device)).bytes_per_s, []
    for name, workload in workloads.items():
        figures = measure(model, engine, workload, device, rounds=3 if scale == "full" else 1)
        figures["floor_ms_per_step"] = floor_ms(engine, workload, bandwidth)
        if name == WITHOUT_GRAPHS and device == "cuda":
            figures |= graphs_off(model, workload)
        seconds, steps = figures["seconds"], figures["decode_ms_per_step"]
        result.figures[name] = figures
        result.ratios[f"tokens_per_s_vs_hf, {name}"] = seconds["hf"] / seconds["ours"]
        result.ratios[f"decode_vs_hf, {name}"] = steps["hf"] / steps["ours"]
        rows.append([name, steps["hf"], steps["ours"], figures["floor_ms_per_step"], seconds["hf"] / seconds["ours"]])
        yield result
    print_table("Decode, ms a step", ["workload", "HF", "ours", "floor", "rollout, times faster"], rows)


def workloads_of(scale: str) -> dict[str, Workload]:
    """Groups of 8; 700-token prompts and 324 new tokens on a GPU."""
    if scale == "full":
        return {name.removeprefix("2B, "): workload for name, workload in CUDA_WORKLOADS.items()}
    small = replace(TINY, prompts=1, patches=8)
    if scale == "smoke":
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


def measure(model: Any, engine: SamplerEngine, workload: Workload, device: str, *, rounds: int) -> dict[str, Any]:
    """Seconds of whole rollouts and of one token, hence milliseconds of a decode step. HF, which is slow, goes once."""
    tokens = workload.new_tokens
    for_one = build_engine(model)
    ours_calls = {
        "whole": lambda: our_rollout(engine, workload, tokens),
        "one": lambda: our_rollout(for_one, workload, 1),
    }
    hf_calls = {"whole": lambda: hf_rollout(model, workload, tokens), "one": lambda: hf_rollout(model, workload, 1)}
    ours = {name: median(times) for name, times in paired_seconds(ours_calls, rounds=rounds, device=device).items()}
    hf_rollout(model, workload, 2)
    theirs = {name: t[0] for name, t in paired_seconds(hf_calls, rounds=1, warmup=0, device=device).items()}
    sides = {"ours": ours, "hf": theirs}
    return {
        "seconds": {name: side["whole"] for name, side in sides.items()},
        "one_token_seconds": {name: side["one"] for name, side in sides.items()},
        "tokens_per_s": {name: workload.rows * tokens / side["whole"] for name, side in sides.items()},
        "decode_ms_per_step": {
            name: 1e3 * (side["whole"] - side["one"]) / (tokens - 1) for name, side in sides.items()
        },
    }
