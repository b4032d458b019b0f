"""How long the sampler takes to take over the policy's weights."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from bench_sampler import build_engine, build_model
from fastgrpo_profiling.roofline import measure_ceilings
from harness import Result, paired_seconds, print_table, spread

from fastgrpo.model.families import text_model
from fastgrpo.sampler.engine import SamplerEngine
from stages.ceilings import compute_dtype


def run(scale: str, device: str) -> Iterator[Result]:
    """Changes the policy, syncs, compares every layer; then times, beside reading and writing the bytes once."""
    result = Result("sync", device)
    model = build_model("2B" if scale == "full" else "tiny", device)
    engine = build_engine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    engine.sync()
    result.checks["weights are the policy's"] = weights_agree(engine, model)
    if result.passed:
        times = paired_seconds({"sync": engine.sync}, rounds=10 if scale == "full" else 3, device=device)["sync"]
        moved = sum(weight.nbytes for weight in [engine.decoder.embed, *layer_weights(engine)])
        floor = moved / (measure_ceilings(device, compute_dtype(device)).bytes_per_s / 2)
        result.figures = {
            "ms": 1e3 * median(times),
            "spread": spread(times),
            "bytes": moved,
            "floor_ms": 1e3 * floor,
        }
        print_table("Weight sync", ["GB", "ms", "floor ms"], [[moved / 1e9, 1e3 * median(times), 1e3 * floor]])
    yield result


def layer_weights(engine: SamplerEngine) -> list[torch.Tensor]:
    return [weight for layer in engine.decoder.layers for weight in vars(layer).values()]


def weights_agree(engine: SamplerEngine, model: Any) -> bool:
    """Whether every layer holds the policy's weights."""
    text, same = text_model(model), [torch.equal(engine.decoder.embed, text_model(model).embed_tokens.weight)]
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
