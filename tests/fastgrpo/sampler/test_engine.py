import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastgrpo_profiling import record, span

from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.sampler.decoder import KVCache
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions, free_memory
from fastgrpo.sampler.sequence import completion_seed
from fastgrpo.types import Completion, Prompt, SamplingParams

GREEDY = SamplingParams(72, temperature=0.0)
DRAWN = SamplingParams(24, temperature=1.3, seed=11)


def generate(engine: SamplerEngine, prompts: list[Prompt], params: SamplingParams, group: int = 2) -> dict[int, Any]:
    return {prompt.row_id: completions for prompt, completions in engine.generate(prompts, group, params, step=3)}


def page_bytes(engine: SamplerEngine) -> int:
    return KVCache.page_bytes(engine.decoder.shape, engine.options.page_size, engine.decoder.dtype)


def assert_equal(ours: Completion, theirs: Completion) -> None:
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert (ours.row_id, ours.index, ours.text, ours.finish_reason) == (
        theirs.row_id,
        theirs.index,
        theirs.text,
        theirs.finish_reason,
    )
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.sampling_logprobs, theirs.sampling_logprobs, atol=1e-4, rtol=0)


# Against transformers


def test_greedy_equals_transformers(family: Any) -> None:
    """All prompts of a family in one batch: pictures of several sizes, one, none."""
    groups = generate(family.engine(stops=False), list(family.prompts.values()), GREEDY)
    for prompt in family.prompts.values():
        plain = family.greedy(prompt, GREEDY.max_new_tokens)
        assert [completion.index for completion in groups[prompt.row_id]] == [0, 1]
        for completion in groups[prompt.row_id]:
            family.assert_same_until_tie(prompt, completion.token_ids, plain)
            family.assert_logprobs(prompt, completion)
            assert completion.finish_reason == "length"


def test_greedy_equals_transformers_in_float64(qwen2_exact: Any) -> None:
    family = qwen2_exact
    engine = family.engine(stops=False)
    assert engine.decoder.dtype == torch.float64
    for prompt in family.prompts.values():
        ours = generate(engine, [prompt], GREEDY, group=1)[prompt.row_id][0]
        family.assert_same_until_tie(prompt, ours.token_ids, family.greedy(prompt, GREEDY.max_new_tokens))


def test_logprobs_of_drawn_tokens_equal_a_forward_pass(family: Any) -> None:
    groups = generate(family.engine(), list(family.prompts.values()), DRAWN)
    for prompt in family.prompts.values():
        for completion in groups[prompt.row_id]:
            assert not torch.isin(completion.token_ids, torch.tensor(family.suppressed)).any()
            family.assert_logprobs(prompt, completion, DRAWN.temperature)


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_greedy_completions_equal_the_reference_engines(qwen2_vl: Any, penalty: float) -> None:
    """Text, finish reason and both log-probs, up to the end token."""
    prompts = list(qwen2_vl.prompts.values())
    params = SamplingParams(30, temperature=0.0, repetition_penalty=penalty)
    engine, reference = qwen2_vl.engine(), PlainEngine(qwen2_vl.model, qwen2_vl.processing.tokenizer)
    plain = generate(reference, prompts, params)  # type: ignore[arg-type]
    end = int(plain[3][0].token_ids[7])  # a token that turns up on the way becomes an end token
    for which in (engine, reference):
        which.eos_ids = sorted({*which.eos_ids, end})
    engine.runner = None
    ours, theirs = generate(engine, prompts, params), generate(reference, prompts, params)  # type: ignore[arg-type]
    assert "stop" in {completion.finish_reason for group in ours.values() for completion in group}
    for prompt in prompts:
        for mine, other in zip(ours[prompt.row_id], theirs[prompt.row_id], strict=True):
            assert_equal(mine, other)


# What a completion depends on


def test_a_completion_depends_on_its_seed_alone(qwen2_vl_exact: Any) -> None:
    """Not on the batch, its order, its size, the page budget or the pages."""
    prompts = list(qwen2_vl_exact.prompts.values())
    together = generate(qwen2_vl_exact.engine(), prompts, DRAWN, group=3)
    longest = max(len(prompt.input_ids) for prompt in prompts) + DRAWN.max_new_tokens + 16
    settings = (
        {"max_rows": 2},
        {"max_rows": 4, "page_size": 4},
        {"max_cache_tokens": longest, "page_size": 8},
        {"prefill_tokens": 7, "steps_per_check": 5},
    )
    for options in settings:
        engine = qwen2_vl_exact.engine(**options)
        others = generate(engine, prompts[::-1], DRAWN, group=3)
        for prompt in prompts:
            alone = generate(engine, [prompt], DRAWN, group=3)[prompt.row_id]
            for mine, other, single in zip(together[prompt.row_id], others[prompt.row_id], alone, strict=True):
                assert_equal(mine, other)
                assert_equal(mine, single)


def test_completions_differ_by_seed_step_row_and_index(qwen2: Any) -> None:
    seeds = {completion_seed(*key) for key in itertools.product(range(4), repeat=4)}
    assert len(seeds) == 4**4
    assert all(0 <= seed < 2**63 for seed in seeds)
    prompt = qwen2.prompts["5 tokens"]
    engine = qwen2.engine()
    drawn = [
        completion.token_ids.tolist()
        for step in range(2)
        for seed in range(2)
        for _, group in engine.generate([prompt], 2, replace(DRAWN, seed=seed), step)
        for completion in group
    ]
    assert len({tuple(tokens) for tokens in drawn}) == 8


# The interface


def test_groups_come_as_soon_as_they_are_complete(qwen2: Any) -> None:
    prompts = list(qwen2.prompts.values())
    engine = qwen2.engine(max_rows=2, stops=False)
    with record() as recorder:
        for i, (prompt, completions) in enumerate(engine.generate(prompts, 2, replace(DRAWN, max_new_tokens=4), 0)):
            assert prompt is prompts[i]
            assert len(completions) == 2
            # The first of four tokens comes of the prefill.
            assert recorder.totals["rollout/prefill"].count == i + 1


def test_an_iterator_left_early_frees_everything(qwen2_exact: Any) -> None:
    engine, prompts = qwen2_exact.engine(max_rows=2), list(qwen2_exact.prompts.values())
    expected = generate(qwen2_exact.engine(), prompts, DRAWN)
    abandoned = engine.generate(prompts, 2, DRAWN, step=3)
    next(abandoned)
    with pytest.raises(RuntimeError, match="another call has not ended"):
        next(engine.generate(prompts, 2, DRAWN, step=3))
    abandoned.close()
    groups = generate(engine, prompts, DRAWN)
    for prompt in prompts:
        for mine, other in zip(groups[prompt.row_id], expected[prompt.row_id], strict=True):
            assert_equal(mine, other)


def test_an_aborted_prompt_gives_what_it_has_and_makes_room(qwen2_exact: Any) -> None:
    """Aborted are one that runs and one that waits; the others are what they are without them."""
    engine, prompts = qwen2_exact.engine(max_rows=3, stops=False), list(qwen2_exact.prompts.values())
    params = replace(DRAWN, max_new_tokens=8)
    expected = generate(qwen2_exact.engine(stops=False), prompts, params)
    found = {}
    for prompt, completions in engine.generate(prompts, 2, params, step=3):
        found[prompt.row_id] = completions
        if prompt.row_id == 0:
            engine.abort(1)
            engine.abort(3)
    lengths = {row: [len(c.token_ids) for c in completions] for row, completions in found.items()}
    assert lengths[0] == lengths[2] == [8, 8]
    assert [c.finish_reason for row in (1, 3) for c in found[row]] == ["length", "abort", "abort", "abort"]
    assert lengths[1][0] == 8
    assert 0 < lengths[1][1] < 8
    assert lengths[3] == [0, 0]
    for row in (0, 2):
        for mine, other in zip(found[row], expected[row], strict=True):
            assert_equal(mine, other)
    engine.abort(2)  # too late: nothing is under way
    again = generate(engine, prompts, params)
    assert [c.finish_reason for row in again for c in again[row]] == ["length"] * 8


def test_decode_and_sampling_share_a_rollouts_time(qwen2: Any) -> None:
    """Each token's draw is timed, the first ones' beside the decode, and no time counts twice."""
    with record() as recorder, span("rollout"):
        generate(qwen2.engine(stops=False), list(qwen2.prompts.values()), replace(DRAWN, max_new_tokens=9))
    totals = recorder.totals
    assert totals["rollout/sample"].count == 9
    assert totals["rollout/decode"].count == 8
    assert 0 < totals["rollout/decode"].self_seconds < totals["rollout/decode"].seconds
    own = sum(total.self_seconds for total in totals.values())
    assert own == pytest.approx(totals["rollout"].seconds, rel=1e-6)


def test_no_prompts_give_no_groups(qwen2: Any) -> None:
    assert list(qwen2.engine().generate([], 4, DRAWN, 0)) == []


def test_buffers_are_kept_from_call_to_call(qwen2: Any) -> None:
    engine, prompts = qwen2.engine(), list(qwen2.prompts.values())
    generate(engine, prompts, DRAWN)
    runner = engine.runner
    generate(engine, prompts[:2], replace(DRAWN, seed=5))
    assert engine.runner is runner
    generate(engine, prompts, replace(DRAWN, temperature=0.5))
    assert engine.runner is not runner


def test_a_prompt_that_cannot_fit_names_the_setting(qwen2: Any) -> None:
    engine = qwen2.engine(max_cache_tokens=48)
    with pytest.raises(ValueError, match=r"max_cache_tokens=48 is too small: row 3 has a prompt of 33 tokens"):
        generate(engine, list(qwen2.prompts.values()), DRAWN)
    assert len(generate(engine, [qwen2.prompts["5 tokens"]], DRAWN)) == 1


def test_a_prompt_that_memory_has_no_room_for_names_no_setting_that_was_left_alone(
    qwen2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = qwen2.engine()
    free = 4 * page_bytes(engine)
    monkeypatch.setattr("fastgrpo.sampler.engine.free_memory", lambda _: free)
    with pytest.raises(
        ValueError, match=r"memory for a KV cache of 48 tokens: row 3 .* Lower max_completion"
    ) as raised:
        generate(engine, list(qwen2.prompts.values()), DRAWN)
    assert "max_cache_tokens" not in str(raised.value)
    assert len(generate(engine, [qwen2.prompts["5 tokens"]], DRAWN)) == 1
    free = 2**30
    assert len(generate(engine, list(qwen2.prompts.values()), DRAWN)) == 4, "memory has become free"


def test_the_cache_leaves_memory_to_what_is_still_to_come(qwen2_vl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training says will come, and features of pictures."""
    cache = VisionCache(vision_tower(qwen2_vl.model), 2**20)
    options = {"vision_cache": cache, "memory_to_come": lambda: 5_000_000}
    engine = SamplerEngine(qwen2_vl.model, qwen2_vl.processing.tokenizer, **options)
    engine.sync()
    free = 5_000_000 + cache.room + 25 * page_bytes(engine)
    monkeypatch.setattr("fastgrpo.sampler.engine.free_memory", lambda _: free)
    generate(engine, list(qwen2_vl.prompts.values()), DRAWN)
    assert engine.runner.limits.pages == 20
    assert engine.served.pages > 20


def test_free_memory_counts_what_torch_holds_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**24, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    assert free_memory(torch.device("cuda")) == 2**24 + 2000
    assert free_memory(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("field", "value"), [("max_rows", 0), ("page_size", 24), ("prefill_tokens", 0), ("max_cache_tokens", -1)]
)
def test_options_that_cannot_work_are_named(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={value} is not valid"):
        SamplerOptions(**{field: value})
