import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastgrpo.config import GRPOConfig
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.model.load import Processing, load_policy, load_processing
from fastgrpo.plain.engine import ReferenceEngine
from fastgrpo.plain.updater import ReferencePolicy, sequence_positions
from fastgrpo.types import Completion, Prompt, RolloutGroup, SamplingParams, WeightedGroup
from fastgrpo.update.objective import loss_params
from fastgrpo.update.plan import plan_updates

GREEDY = SamplingParams(max_new_tokens=7, temperature=0.0)


@pytest.fixture(scope="module")
def processing(tiny_model_dir: Path) -> Processing:
    return load_processing(str(tiny_model_dir))


@pytest.fixture(scope="module")
def shared_vlm(tiny_model_dir: Path) -> Any:
    return sharpened(load_policy(str(tiny_model_dir)))


@pytest.fixture
def vlm(shared_vlm: Any) -> Any:
    return copy.deepcopy(shared_vlm)


def sharpened(model: Any) -> Any:
    """Larger weights: a fresh model's distributions are nearly uniform and forget the context."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if "embed_tokens" in name else 6)
    return model.eval()


def picture(width: int, height: int, colour: str) -> Image.Image:
    image = Image.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, width // 2, height // 3))
    return image


ROWS = {
    "one image": Row(3, [picture(112, 84, "red")], "How many cubes are there?"),
    "two images": Row(
        5, [picture(84, 140, "blue"), picture(56, 56, "green")], "Which picture is darker, and why is it?"
    ),
    "no image": Row(8, [], "Is two more than one?"),
}


@pytest.fixture(scope="module")
def prompts(processing: Processing) -> dict[str, Prompt]:
    builder = PromptBuilder(processing.tokenizer, processing.image_processor)
    return {name: builder.build(row) for name, row in ROWS.items()}


def hf_inputs(model: Any, prompt: Prompt, token_ids: Tensor | None = None) -> dict[str, Tensor]:
    """What a plain user of transformers passes for a prompt (and a completion): one row, no padding, no positions."""
    ids = prompt.input_ids if token_ids is None else torch.cat([prompt.input_ids, token_ids])
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if prompt.pixel_values is not None:
        inputs["pixel_values"], inputs["image_grid_thw"] = prompt.pixel_values, prompt.image_grid_thw
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()[None]
    return inputs


def hf_logits(model: Any, prompt: Prompt, token_ids: Tensor) -> Tensor:
    """[C, V] float64: the logits that predict each completion token, from a forward pass of its own."""
    logits = model(**hf_inputs(model, prompt, token_ids), use_cache=False).logits[0]
    return logits[len(prompt.input_ids) - 1 : -1].double()


def generate(engine: Any, prompts: list[Prompt], params: SamplingParams, group: int = 1, step: int = 0) -> Any:
    return list(engine.generate(prompts, group, params, step))


# The engine


@pytest.mark.parametrize(
    "names",
    [["one image"], ["two images"], ["no image"], ["no image", "one image"], ["two images", "no image", "one image"]],
)
def test_greedy_equals_plain_generate(
    vlm: Any, processing: Processing, prompts: dict[str, Prompt], names: list[str]
) -> None:
    engine = ReferenceEngine(vlm, processing.tokenizer)
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


@pytest.mark.parametrize("name", list(ROWS))
def test_positions_equal_those_of_transformers(vlm: Any, prompts: dict[str, Prompt], name: str) -> None:
    prompt = prompts[name]
    token_ids = torch.tensor([1, 2, 3, 4])
    ids = torch.cat([prompt.input_ids, token_ids])[None]
    theirs, _ = vlm.model.get_rope_index(
        ids, mm_token_type_ids=(ids == vlm.config.image_token_id).int(), image_grid_thw=prompt.image_grid_thw
    )
    assert torch.equal(sequence_positions(prompt, 4), theirs[:, 0])
    assert torch.equal(prompt.position_ids, theirs[:, 0, :-4])


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
    engine = ReferenceEngine(vlm, processing.tokenizer)
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
    engine = ReferenceEngine(vlm, processing.tokenizer)
    short = min(prompts.values(), key=lambda prompt: len(prompt.input_ids))
    alone = generate(engine, [short], params)
    engine.pad_id = all_tokens(alone)[0][0]
    assert engine.pad_id not in short.input_ids
    padded = [group for group in generate(engine, list(prompts.values()), params) if group[0] is short]
    assert all_tokens(padded) == all_tokens(alone)


def test_suppressed_tokens_are_never_drawn(vlm: Any, processing: Processing, prompts: dict[str, Prompt]) -> None:
    engine = ReferenceEngine(vlm, processing.tokenizer)
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
    engine = ReferenceEngine(vlm, processing.tokenizer)
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
    engine = ReferenceEngine(vlm, processing.tokenizer, max_batch=4)  # two groups a call
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
        generate(ReferenceEngine(vlm, processing.tokenizer, rank=1, max_batch=4), chosen, params, group=2, step=7),
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
    engine = ReferenceEngine(vlm, processing.tokenizer)
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
    plain = generate(ReferenceEngine(vlm, processing.tokenizer), chosen, params, group=2)
    for name, value in HOSTILE.items():
        setattr(vlm.generation_config, name, value)
    model = get_peft_model(vlm, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if wrapped else vlm
    assert all_tokens(generate(ReferenceEngine(model, processing.tokenizer), chosen, params, group=2)) == all_tokens(
        plain
    )


def test_a_text_batch_after_pictures_is_as_before(vlm: Any, processing: Processing, prompts: dict[str, Prompt]) -> None:
    engine = ReferenceEngine(vlm, processing.tokenizer)
    before = generate(engine, [prompts["no image"]], GREEDY)
    generate(engine, [prompts["one image"], prompts["two images"]], GREEDY)
    assert all_tokens(generate(engine, [prompts["no image"]], GREEDY)) == all_tokens(before)


def test_no_prompts_give_no_groups(vlm: Any, processing: Processing) -> None:
    assert generate(ReferenceEngine(vlm, processing.tokenizer), [], GREEDY, group=2) == []


# The policy

TEMPERATURE = 0.8
CASES = [
    ("grpo", 0.04, "token", None), ("grpo", 0.0, "sequence", None),
    ("bnpo", 0.04, "sequence", 1.1), ("bnpo", 0.0, "token", None),
    ("dr_grpo", 0.04, "token", 1.1), ("dr_grpo", 0.0, "sequence", None),
    ("dapo", 0.04, "sequence", None), ("dapo", 0.0, "token", 1.1),
    ("cispo", 0.04, "token", None), ("cispo", 0.0, "sequence", None),
    ("sapo", 0.04, "sequence", None), ("sapo", 0.0, "token", None),
    ("luspo", 0.04, "sequence", None), ("luspo", 0.0, "token", 1.1),
]  # fmt: skip


def settings(**overrides: Any) -> GRPOConfig:
    return GRPOConfig(
        **{
            "output_dir": "unused", "use_cpu": True, "report_to": [], "num_generations": 2, "temperature": TEMPERATURE,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_completion_length": 6,
            "epsilon": 0.1, "epsilon_high": 0.15, **overrides,
        }
    )  # fmt: skip


LENGTHS = [(5, 1), (6, 3), (2, 4)]
MASKED_OUT = (1, 0)
"""Group and index of the completion that does not count."""


def make_groups(model: Any, prompts: list[Prompt], config: GRPOConfig, old_noise: float = 0.2) -> list[WeightedGroup]:
    """Groups of two ragged completions with random tokens, advantages and π_old, one completion masked out."""
    draw = torch.Generator().manual_seed(11)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rollout, masks, old = [], [], []
    for g, (prompt, lengths) in enumerate(zip(prompts, LENGTHS, strict=True)):
        completions = []
        for index, length in enumerate(lengths):
            token_ids = torch.randint(8, vocabulary - 40, (length,), generator=draw)
            with torch.no_grad():
                logprobs = (hf_logits(model, prompt, token_ids) / TEMPERATURE).log_softmax(-1)
            logprobs = logprobs.gather(1, token_ids[:, None])[:, 0].float()
            completions.append(Completion(prompt.row_id, index, token_ids, "", "stop", logprobs, logprobs - 0.5))
            masks.append(torch.full((length,), (g, index) != MASKED_OUT))
            old.append(logprobs + old_noise * torch.randn(length, generator=draw))
        rollout.append(RolloutGroup(prompt, tuple(completions), torch.zeros(2, 1)))
    (step,) = plan_updates(
        rollout,
        torch.randn(6, generator=draw),
        masks,
        config,
        total_sequences=len(masks),
        total_tokens=sum(int(mask.sum()) for mask in masks),
        world_size=1,
    )
    return [replace(group, old_logprobs=tuple(old[2 * g : 2 * g + 2])) for g, group in enumerate(step)]


def expected_loss(model: Any, reference: Any, groups: list[WeightedGroup], config: GRPOConfig) -> Tensor:
    """The objective in float64 from one plain forward pass per completion, aggregation written out by name."""
    sums, means, counts = [], [], []
    for group in groups:
        for completion, advantage, mask, old in zip(
            group.completions, group.advantages.double(), group.masks, group.old_logprobs or (), strict=True
        ):

            def logprobs_of(m: Any, prompt: Prompt = group.prompt, ids: Tensor = completion.token_ids) -> Tensor:
                return (hf_logits(m, prompt, ids) / config.temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]

            logprobs, count = logprobs_of(model), mask.sum()
            log_ratio = logprobs - old.double()
            if config.importance_sampling_level == "sequence":
                log_ratio = ((log_ratio * mask).sum() / count.clamp(min=1)).expand_as(log_ratio)
            ratio = log_ratio.exp()
            low, high = 1 - config.epsilon, 1 + config.epsilon_high
            if config.loss_type == "cispo":
                loss = -ratio.detach().clamp(max=config.epsilon_high) * advantage * logprobs
            elif config.loss_type == "sapo":
                tau = config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg
                loss = -advantage * 4 * torch.sigmoid(tau * (ratio - 1)) / tau
            else:
                unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
                loss = -torch.min(unclipped * advantage, ratio.clamp(low, high) * advantage)
            if config.beta:
                with torch.no_grad():
                    d = logprobs_of(reference)
                d = d - logprobs
                loss = loss + config.beta * (d.exp() - d - 1) * ratio
            sums.append((loss * mask).sum())
            means.append(sums[-1] / count.clamp(min=1))
            counts.append(count)
    total, tokens = torch.stack(sums), torch.stack(counts)
    if config.loss_type in ("grpo", "sapo"):
        return torch.stack(means).mean()
    if config.loss_type == "bnpo":  # micro-batches of two
        return (total.view(3, 2).sum(1) / tokens.view(3, 2).sum(1)).mean()
    if config.loss_type == "dr_grpo":
        return total.sum() / (len(sums) * config.max_completion_length)
    return total.mean() if config.loss_type == "luspo" else total.sum() / tokens.sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    assert scale > 1e-3
    for name, gradient in theirs.items():
        own_scale = max(gradient.abs().max().item(), 1e-3 * scale)
        assert (ours[name] - gradient).abs().max().item() <= tolerance * own_scale, name


def policy_of(model: Any, config: GRPOConfig, reference: Any = None, micro_batch_size: int = 2) -> ReferencePolicy:
    return ReferencePolicy(
        model,
        loss_params(config),
        micro_batch_size=micro_batch_size,
        temperature=config.temperature,
        reference_model=reference,
    )


def moved(model: Any, amount: float = 0.03) -> Any:
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=draw))
    return other


@pytest.mark.parametrize(("loss_type", "beta", "level", "delta"), CASES)
def test_loss_and_gradients_equal_the_formula(
    vlm: Any, prompts: dict[str, Prompt], loss_type: str, beta: float, level: str, delta: float | None
) -> None:
    config = settings(loss_type=loss_type, beta=beta, importance_sampling_level=level, delta=delta)
    reference = moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    result = policy_of(vlm, config, reference).accumulate(groups)
    ours = gradients(vlm)
    expected = expected_loss(vlm, reference, groups, config)
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    assert not result.loss.requires_grad
    assert_same_gradients(ours, gradients(vlm))
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_metrics_of_an_update(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, reference = settings(beta=0.04, use_bias_correction_kl=False), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    result = policy_of(vlm, config, reference, micro_batch_size=4).accumulate(groups)
    entropy, kl, count, ratios = 0.0, 0.0, 0, []
    for group in groups:
        for completion, mask, old in zip(group.completions, group.masks, group.old_logprobs or (), strict=True):
            if not mask.any():
                continue
            with torch.no_grad():
                now, then = (
                    (hf_logits(m, group.prompt, completion.token_ids) / TEMPERATURE).log_softmax(-1)
                    for m in (vlm, reference)
                )
            chosen = completion.token_ids[:, None]
            d = (then - now).gather(1, chosen)
            entropy -= (now.exp() * now).sum().item()
            kl += (d.exp() - d - 1).sum().item()
            count += len(mask)
            ratios.append((now.gather(1, chosen)[:, 0] - old).exp())
    metrics, mismatch = result.metrics, result.mismatch
    assert metrics.token_count.item() == mismatch.token_count.item() == count
    assert metrics.sequence_count.item() == 5
    assert metrics.entropy_sum.item() == pytest.approx(entropy, rel=1e-5)
    assert metrics.kl_sum.item() == pytest.approx(kl, rel=1e-4)
    assert metrics.ratio_max.item() == pytest.approx(torch.cat(ratios).max().item(), rel=1e-5)
    # Every token was drawn half a nat below the policy's log-prob.
    assert mismatch.difference_sum.item() == pytest.approx(0.5 * count, rel=1e-4)
    assert mismatch.difference_max.item() == pytest.approx(0.5, abs=1e-4)
    assert mismatch.ratio_min.item() == pytest.approx(math.exp(0.5), rel=1e-4)


def test_without_old_logprobs_the_ratio_is_one(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config = settings(loss_type="grpo")
    groups = make_groups(vlm, list(prompts.values()), config, old_noise=0.0)
    policy = policy_of(vlm, config)
    policy.accumulate(groups)
    stated = gradients(vlm)
    result = policy.accumulate([replace(group, old_logprobs=None) for group in groups])
    assert_same_gradients(gradients(vlm), stated)
    assert result.metrics.ratio_min.item() == result.metrics.ratio_max.item() == 1.0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_gradients_do_not_depend_on_the_micro_batch(vlm: Any, prompts: dict[str, Prompt], loss_type: str) -> None:
    config, reference = settings(loss_type=loss_type, beta=0.04), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    losses, found = [], []
    for size in (1, 4, 6):
        result = policy_of(vlm, config, reference, micro_batch_size=size).accumulate(groups)
        losses.append(result.loss.item())
        found.append(gradients(vlm))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])


def test_gradients_add_up_over_calls(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config = settings(loss_type="dapo")
    groups = make_groups(vlm, list(prompts.values()), config)
    policy = policy_of(vlm, config)
    policy.accumulate(groups)
    at_once = gradients(vlm)
    for group in groups:
        policy.accumulate([group])
    assert_same_gradients(gradients(vlm), at_once)


def test_logprobs_are_the_policys(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config = settings()
    groups = make_groups(vlm, list(prompts.values()), config)
    found = policy_of(vlm, config, micro_batch_size=4).logprobs(groups)
    for group, pieces in zip(groups, found, strict=True):
        for completion, logprobs in zip(group.completions, pieces, strict=True):
            assert torch.allclose(logprobs, completion.logprobs, atol=1e-5)
            assert not logprobs.requires_grad


def test_a_masked_completion_has_no_influence(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, reference = settings(loss_type="grpo", beta=0.04), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    policy = policy_of(vlm, config, reference)
    policy.accumulate(groups)
    before = gradients(vlm)
    g, index = MASKED_OUT
    completions, old = list(groups[g].completions), list(groups[g].old_logprobs or ())
    completions[index] = replace(completions[index], token_ids=completions[index].token_ids.flip(0) + 1)
    old[index] = torch.full_like(old[index], math.nan)
    groups[g] = replace(groups[g], completions=tuple(completions), old_logprobs=tuple(old))
    policy.accumulate(groups)
    assert_same_gradients(gradients(vlm), before)


def test_no_groups_leave_no_gradients(vlm: Any) -> None:
    policy = policy_of(vlm, settings(beta=0.04), reference=vlm)
    result = policy.accumulate([])
    assert result.loss.item() == 0.0
    assert result.metrics.token_count.item() == result.mismatch.token_count.item() == 0
    assert gradients(vlm) == {}
    assert policy.logprobs([]) == []


def test_gradient_checkpointing_changes_nothing(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, reference = settings(loss_type="grpo", beta=0.04), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    policy = policy_of(vlm.train(), config, reference)
    policy.accumulate(groups)
    plain = gradients(vlm)
    vlm.gradient_checkpointing_enable()
    policy.accumulate(groups)
    assert vlm.is_gradient_checkpointing
    assert_same_gradients(gradients(vlm), plain)


TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_text_models(processing: Processing, family: str) -> None:
    torch.manual_seed(0)
    vocabulary = len(processing.tokenizer)
    model = (
        Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **TEXT))
        if family == "qwen2"
        else LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **TEXT))
    )
    sharpened(model)
    builder = PromptBuilder(processing.tokenizer, None)
    texts = ["Is it?", "How many of them are there in all?", "Why?"]
    prompts = [builder.build(Row(i, [], text)) for i, text in enumerate(texts)]
    engine = ReferenceEngine(model, processing.tokenizer)
    assert engine.suppressed == []
    for prompt, (completion,) in generate(engine, prompts, GREEDY):
        plain = model.generate(
            **hf_inputs(model, prompt), do_sample=False, max_new_tokens=7, eos_token_id=engine.eos_ids, pad_token_id=0
        )
        assert completion.token_ids.tolist() == plain[0, len(prompt.input_ids) :].tolist()
        full = hf_logits(model, prompt, completion.token_ids).log_softmax(-1)
        exact = full.gather(1, completion.token_ids[:, None])[:, 0].float()
        assert torch.allclose(completion.logprobs, exact, atol=1e-4)
    config, reference = settings(loss_type="grpo", beta=0.04), moved(model)
    groups = make_groups(model, prompts, config)
    result = policy_of(model, config, reference, micro_batch_size=4).accumulate(groups)
    ours = gradients(model)
    expected = expected_loss(model, reference, groups, config)
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(model))


def test_the_reference_of_adapters_is_the_model_without_them(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, base = settings(loss_type="grpo", beta=0.5), copy.deepcopy(vlm)
    model = get_peft_model(vlm, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    groups = make_groups(model, list(prompts.values()), config)
    adapters_off = policy_of(model, config).accumulate(groups)
    ours = gradients(model)
    assert ours
    assert all("lora_" in name for name in ours)
    separate = policy_of(model, config, base).accumulate(groups)
    assert adapters_off.metrics.kl_sum.item() > 0.01
    assert adapters_off.loss.item() == pytest.approx(separate.loss.item(), rel=1e-6)
    assert_same_gradients(ours, gradients(model))
