import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_forward import hf_inputs, hf_logits
from torch import Tensor
from transformers import GenerationConfig

from fastgrpo.model.load import Processing
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.types import Prompt, SamplingParams

GREEDY = SamplingParams(max_new_tokens=7, temperature=0.0)


def generate(engine: Any, prompts: list[Prompt], params: SamplingParams, group: int = 1, step: int = 0) -> Any:
    return list(engine.generate(prompts, group, params, step))


@pytest.mark.parametrize(
    "names",
    [["one image"], ["two images"], ["no image"], ["no image", "one image"], ["two images", "no image", "one image"]],
)
def test_greedy_equals_plain_generate(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt], names: list[str]
) -> None:
    engine = PlainEngine(vlm, processing.tokenizer)
    groups = generate(engine, [prompts[name] for name in names], GREEDY, group=2)
    assert [prompt.row_id for prompt, _ in groups] == [prompts[name].row_id for name in names]
    for prompt, completions in groups:
        plain = vlm.generate(
            **hf_inputs(vlm, prompt),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=GREEDY.max_new_tokens,
                suppress_tokens=[vlm.config.image_token_id, vlm.config.video_token_id],
                eos_token_id=processing.tokenizer.eos_token_id,
                pad_token_id=processing.tokenizer.pad_token_id,
            ),
        )[0, len(prompt.input_ids) :]
        assert [c.index for c in completions] == [0, 1]
        for completion in completions:
            assert completion.row_id == prompt.row_id
            assert completion.token_ids.tolist() == plain.tolist()
            assert completion.text == processing.tokenizer.decode(plain, skip_special_tokens=True)


WARPS = [
    SamplingParams(9),
    SamplingParams(9, temperature=0.7, top_k=12),
    SamplingParams(9, temperature=1.6, top_p=0.8),
    SamplingParams(9, temperature=1.3, min_p=0.2),
    SamplingParams(9, repetition_penalty=1.8),
    SamplingParams(9, temperature=0.0, repetition_penalty=1.8),
    SamplingParams(9, temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=0.7),
]


def warped(logits: Tensor, seen: Tensor, suppressed: list[int], params: SamplingParams) -> Tensor:
    """[V] float64 log-probs of the distribution that a token is drawn from, after the tokens `seen`."""
    scores = logits.clone()
    scores[suppressed] = -math.inf
    for token in set(seen.tolist()):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    if params.temperature > 0:
        scores = scores / params.temperature
    order = scores.argsort(descending=True)
    if params.top_k:
        scores[order[params.top_k :]] = -math.inf
    before = scores.softmax(-1)[order].cumsum(-1) - scores.softmax(-1)[order]  # the mass that is likelier
    scores[order[before >= params.top_p]] = -math.inf
    probs = scores.softmax(-1)
    scores[probs < params.min_p * probs.max()] = -math.inf
    return scores.log_softmax(-1)


@pytest.mark.parametrize("params", WARPS)
def test_logprobs_equal_a_full_forward_pass(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt], params: SamplingParams
) -> None:
    engine = PlainEngine(vlm, processing.tokenizer)
    for prompt, completions in generate(engine, list(prompts.values()), params, group=3):
        for completion in completions:
            with torch.no_grad():
                logits = hf_logits(vlm, prompt, completion.token_ids)
            full = (logits / (params.temperature or 1.0)).log_softmax(-1)
            for t, token in enumerate(completion.token_ids.tolist()):
                seen = torch.cat([prompt.input_ids, completion.token_ids[:t]])
                drawn = warped(logits[t], seen, engine.suppressed, params)
                assert drawn[engine.suppressed].isneginf().all()
                assert completion.logprobs[t].item() == pytest.approx(full[t, token].item(), abs=1e-4)
                assert completion.sampling_logprobs[t].item() == pytest.approx(drawn[token].item(), abs=1e-4)


def test_padding_is_no_repetition(vlm: Any, processing: Processing, prompts: dict[str, Prompt]) -> None:
    params = SamplingParams(4, temperature=0.0, repetition_penalty=3.0)
    engine = PlainEngine(vlm, processing.tokenizer)
    short = min(prompts.values(), key=lambda prompt: len(prompt.input_ids))
    alone = generate(engine, [short], params)
    engine.pad_id = all_tokens(alone)[0][0]
    assert engine.pad_id not in short.input_ids
    padded = [group for group in generate(engine, list(prompts.values()), params) if group[0] is short]
    assert all_tokens(padded) == all_tokens(alone)


def test_suppressed_tokens_are_never_drawn(vlm: Any, processing: Processing, prompts: dict[str, Prompt]) -> None:
    engine = PlainEngine(vlm, processing.tokenizer)
    assert engine.suppressed == [vlm.config.image_token_id, vlm.config.video_token_id]
    tokens = {t for _, group in generate(engine, [*prompts.values()], GREEDY) for t in group[0].token_ids.tolist()}
    engine.suppressed = sorted(tokens)  # the likeliest ones, of all
    for params in (GREEDY, SamplingParams(7, temperature=0.5)):
        for _, group in generate(engine, list(prompts.values()), params, group=4):
            for completion in group:
                assert not tokens & set(completion.token_ids.tolist())
                assert completion.sampling_logprobs.isfinite().all()
                # Full softmax against one without the likeliest tokens: what was drawn gained.
                assert (completion.sampling_logprobs > completion.logprobs).all()


def test_the_end_token_ends_and_belongs_to_a_completion(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt]
) -> None:
    engine = PlainEngine(vlm, processing.tokenizer)
    prompt = prompts["one image"]
    ((_, (long,)),) = generate(engine, [prompt], GREEDY)
    assert (long.finish_reason, len(long.token_ids)) == ("length", 7)
    end = long.token_ids[3].item()
    assert end not in long.token_ids[:3].tolist()
    engine.eos_ids = [processing.tokenizer.eos_token_id, end]
    groups = dict(zip(prompts, generate(engine, list(prompts.values()), GREEDY), strict=True))
    (short,) = groups["one image"][1]
    assert short.finish_reason == "stop"
    assert short.token_ids.tolist() == long.token_ids[:4].tolist()
    assert torch.allclose(short.logprobs, long.logprobs[:4], atol=1e-5)
    for _, (completion,) in groups.values():
        assert len(completion.logprobs) == len(completion.sampling_logprobs) == len(completion.token_ids)
        is_end = torch.isin(completion.token_ids, torch.tensor(engine.eos_ids))
        assert is_end.tolist() == [False] * (len(is_end) - 1) + [completion.finish_reason == "stop"]


def all_tokens(groups: Any) -> list[list[int]]:
    return [completion.token_ids.tolist() for _, group in groups for completion in group]


def test_completions_are_a_function_of_seed_and_step(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt]
) -> None:
    chosen, params = list(prompts.values()), SamplingParams(6, seed=4)
    engine = PlainEngine(vlm, processing.tokenizer, max_batch=4)  # two groups a call
    torch.manual_seed(1)
    first = generate(engine, chosen, params, group=2, step=7)
    torch.manual_seed(2)
    again = []
    for group in engine.generate(chosen, 2, params, 7):
        torch.rand(3)  # a reward function that draws numbers between groups
        again.append(group)
    assert all_tokens(again) == all_tokens(first)
    others = [
        generate(engine, chosen, params, group=2, step=8),
        generate(engine, chosen, replace(params, seed=5), group=2, step=7),
        generate(PlainEngine(vlm, processing.tokenizer, rank=1, max_batch=4), chosen, params, group=2, step=7),
    ]
    for other in others:
        assert all_tokens(other) != all_tokens(first)
    same_prompt = generate(engine, [chosen[0]] * 4, params, group=2, step=7)
    assert len({tuple(tokens) for tokens in all_tokens(same_prompt)}) == 8, "no two calls share their random numbers"


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_no_trace(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt], training: bool
) -> None:
    vlm.train(training)
    engine = PlainEngine(vlm, processing.tokenizer)
    own, state = vlm.generation_config, torch.get_rng_state()
    stream = engine.generate(list(prompts.values()), 2, SamplingParams(3), 0)
    next(stream)
    assert torch.equal(torch.get_rng_state(), state), "between groups, too"
    list(stream)
    assert torch.equal(torch.get_rng_state(), state)
    assert vlm.training is training
    assert vlm.generation_config is own


HOSTILE = {
    "do_sample": True, "repetition_penalty": 1.05, "top_k": 1, "top_p": 0.01, "temperature": 0.1, "min_p": 0.9,
    "typical_p": 0.2, "no_repeat_ngram_size": 1, "suppress_tokens": [0, 1, 2, 3], "bad_words_ids": [[40]],
    "min_new_tokens": 5, "max_new_tokens": 2, "begin_suppress_tokens": [9],
}  # fmt: skip


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(7, temperature=0.9)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_models_own_generation_settings_have_no_effect(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt], params: SamplingParams, wrapped: bool
) -> None:
    chosen = list(prompts.values())
    plain = generate(PlainEngine(vlm, processing.tokenizer), chosen, params, group=2)
    for name, value in HOSTILE.items():
        setattr(vlm.generation_config, name, value)
    model = get_peft_model(vlm, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if wrapped else vlm
    assert all_tokens(generate(PlainEngine(model, processing.tokenizer), chosen, params, group=2)) == all_tokens(plain)


def test_a_text_batch_after_pictures_is_as_before(vlm: Any, processing: Processing, prompts: dict[str, Prompt]) -> None:
    engine = PlainEngine(vlm, processing.tokenizer)
    before = generate(engine, [prompts["no image"]], GREEDY)
    generate(engine, [prompts["one image"], prompts["two images"]], GREEDY)
    assert all_tokens(generate(engine, [prompts["no image"]], GREEDY)) == all_tokens(before)


def test_no_prompts_give_no_groups(vlm: Any, processing: Processing) -> None:
    assert generate(PlainEngine(vlm, processing.tokenizer), [], GREEDY, group=2) == []


def test_text_models(text_model: Any, text_prompts: list[Prompt], processing: Processing) -> None:
    engine = PlainEngine(text_model, processing.tokenizer)
    assert engine.suppressed == []
    for prompt, (completion,) in generate(engine, text_prompts, GREEDY):
        plain = text_model.generate(
            **hf_inputs(text_model, prompt),
            do_sample=False,
            max_new_tokens=7,
            eos_token_id=engine.eos_ids,
            pad_token_id=0,
        )
        assert completion.token_ids.tolist() == plain[0, len(prompt.input_ids) :].tolist()
        full = hf_logits(text_model, prompt, completion.token_ids).log_softmax(-1)
        exact = full.gather(1, completion.token_ids[:, None])[:, 0].float()
        assert torch.allclose(completion.logprobs, exact, atol=1e-4)
