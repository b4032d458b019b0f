"""The sampler in bfloat16, on a CPU: as near to exact arithmetic as that dtype allows."""

import copy
from dataclasses import replace
from typing import Any

import torch
from rounding import PRODUCTS, RoundedAtRandom

from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.types import Completion, SamplingParams

GREEDY = SamplingParams(72, temperature=0.0)
DRAWN = SamplingParams(24, temperature=1.0, seed=4)


def completions_of(engine: SamplerEngine, family: Any, params: SamplingParams) -> list[tuple[Any, Completion]]:
    groups = engine.generate(list(family.prompts.values()), 2, params, step=0)
    return [(prompt, completion) for prompt, group in groups for completion in group]


def test_tokens_and_logprobs_are_exact_up_to_rounding(family: Any) -> None:
    """Against the same bfloat16 weights computed with in float32, on the tokens that the sampler drew.

    Log-probs are no further off than transformers' in float32 with products and residual sums rounded to bfloat16 at
    random. Greedy tokens are the best, or tied with them up to what such rounding does to two logits.
    """
    half = replace(family, model=copy.deepcopy(family.model).bfloat16())
    exact = replace(half, model=copy.deepcopy(half.model).float())
    engine = half.engine(stops=False)
    assert engine.decoder.dtype == torch.bfloat16
    errors, allowed, behind, ties = [], [], [], []
    for params in (GREEDY, DRAWN):
        for prompt, completion in completions_of(engine, half, params):
            chosen = completion.token_ids[:, None]
            truth = exact.logits(prompt, completion.token_ids)
            with RoundedAtRandom(torch.bfloat16, PRODUCTS | {"add"}, seed=len(errors)):
                rounded = exact.logits(prompt, completion.token_ids)
            known, noisy = (logits.log_softmax(-1).gather(1, chosen).squeeze(1) for logits in (truth, rounded))
            errors.append((completion.logprobs - known).abs())
            allowed.append((noisy - known).abs())
            if params is GREEDY:
                ties.append(2 * (rounded - truth).abs().max())
                truth[:, half.suppressed] = -torch.inf
                behind.append((truth.amax(dim=1) - truth.gather(1, chosen).squeeze(1)).max())
    assert torch.cat(errors).mean() <= torch.cat(allowed).mean()
    assert torch.cat(errors).max() <= 1.5 * torch.cat(allowed).max()
    assert max(behind) <= max(ties)


def test_a_float32_policy_is_sampled_in_bfloat16_and_synced(qwen2_vl: Any) -> None:
    """Weights rounded once, the cache in bfloat16; after a step it draws what a sampler made afterwards draws."""
    family = replace(qwen2_vl, model=copy.deepcopy(qwen2_vl.model))

    def build() -> SamplerEngine:
        engine = SamplerEngine(family.model, family.processing.tokenizer, dtype=torch.bfloat16)
        engine.sync()
        return engine

    engine = build()
    before = completions_of(engine, family, DRAWN)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=draw))
    engine.sync()
    after, fresh = (completions_of(e, family, DRAWN) for e in (engine, build()))
    assert engine.runner is not None
    assert {t.dtype for t in (*engine.runner.cache.keys, *engine.runner.cache.values)} == {torch.bfloat16}
    layer = family.model.model.language_model.layers[1]
    assert torch.equal(engine.decoder.layers[1].down, layer.mlp.down_proj.weight.bfloat16())
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for (_, a), (_, b) in zip(before, after, strict=True))
    for (_, ours), (_, theirs) in zip(after, fresh, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.logprobs, theirs.logprobs)
