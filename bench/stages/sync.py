"""How long the sampler takes to take over the policy's weights."""

import copy
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, compute_dtype, print_table
from sides.rollout import build_engine
from timing import paired_seconds, queued_seconds, spread
from workloads import build_model

from fastgrpo.model.families import text_model
from fastgrpo.sampler.engine import SamplerEngine
from stages import Task


def run(task: Task) -> Iterator[Result]:
    """Changes the policy, syncs, compares every layer; then times, beside reading and writing the bytes once."""
    scale, device = task.scale, task.device
    result = Result("sync", device)
    model = build_model("2B" if scale == "full" else "4M", device, torch.float32)  # as it is trained
    engine = build_engine(model, dtype=compute_dtype(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    engine.sync()
    result.checks["weights are the policy's"] = weights_agree(engine, model)
    if result.passed:
        rounds = 10 if scale == "full" else 3
        times = queued_seconds(engine.sync, rounds=rounds, device=device)
        waited = paired_seconds({"sync": engine.sync}, rounds=rounds, device=device)["sync"]
        weights = [engine.decoder.embed, *layer_weights(engine)]
        moved = sum(weight.numel() * (4 + weight.itemsize) for weight in weights)  # read in float32, written
        floor = moved / measure_ceilings(device, compute_dtype(device)).bytes_per_s
        result.figures = {
            "ms": 1e3 * median(times),
            "ms_with_launches": 1e3 * median(waited),
            "spread": spread(times),
            "bytes": moved,
            "floor_ms": 1e3 * floor,
        }
        print_table("Weight sync", ["GB", "ms", "floor ms"], [[moved / 1e9, 1e3 * median(times), 1e3 * floor]])
    yield result


def layer_weights(engine: SamplerEngine) -> list[torch.Tensor]:
    return [weight for layer in engine.decoder.layers for weight in vars(layer).values()]


def weights_agree(engine: SamplerEngine, model: Any) -> bool:
    """Whether every layer holds the policy's weights, in the sampler's dtype."""
    text = copy.deepcopy(text_model(model)).to(engine.decoder.dtype)
    same = [torch.equal(engine.decoder.embed, text.embed_tokens.weight)]
    for layer, mine in zip(text.layers, engine.decoder.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        same += [
            torch.equal(mine.qkv, torch.cat([projection.weight for projection in projections])),
            torch.equal(mine.qkv_bias, torch.cat([projection.bias for projection in projections])),
            torch.equal(mine.out, attention.o_proj.weight),
            torch.equal(mine.gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
            torch.equal(mine.down, mlp.down_proj.weight),
            torch.equal(mine.input_norm, layer.input_layernorm.weight),
            torch.equal(mine.post_norm, layer.post_attention_layernorm.weight),
        ]
    return all(same)
