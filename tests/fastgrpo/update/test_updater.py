"""The packed updater against the plain one: same loss, metrics and gradients, on every kind of batch."""

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastgrpo_kernels import LossParams
from peft import LoraConfig, get_peft_model
from rounding import PRODUCTS, RoundedAtRandom
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import Completion, Prompt, TrainingGroup
from fastgrpo.update.updater import PackedUpdater

VOCABULARY, IMAGE, TEMPERATURE = 97, 90, 0.8
EVERYTHING = 10**6  # a budget that no batch exceeds

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def build(family: str) -> Any:
    """A tiny model whose weights are large enough for its distributions to depend on the context."""
    torch.manual_seed(0)
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **SPECIAL)
        )
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **SPECIAL)
        )
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8, tie_word_embeddings=True))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    else:
        model = LlamaForCausalLM(LlamaConfig(**TEXT))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4 if "embed_tokens" in name else 8)
    return model


@pytest.fixture(scope="module")
def model_of() -> Any:
    """A fresh copy of a family's model."""
    built = functools.cache(build)
    return lambda family: copy.deepcopy(built(family))


def prompt_of(row: int, length: int, grids: Sequence[tuple[int, int]] = ()) -> Prompt:
    """`length` text tokens, with a picture of h × w patches after each of the first ones."""
    draw = torch.Generator().manual_seed(row)
    ids, positions, start = [], [], 0
    text = torch.randint(3, IMAGE, (length,), generator=draw).split([1] * len(grids) + [length - len(grids)])
    for i, words in enumerate(text):
        ids.append(words)
        positions.append(torch.arange(start, start + len(words)).expand(3, -1))
        start += len(words)
        if i < len(grids):
            height, width = (side // 2 for side in grids[i])
            ids.append(torch.full((height * width,), IMAGE))
            place = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).T
            positions.append(place + start)
            start += max(height, width)
    patches = sum(height * width for height, width in grids)
    return Prompt(
        row,
        torch.cat(ids),
        torch.cat(positions, dim=1),
        torch.randn(patches, 3 * 2 * 4 * 4, generator=draw) if grids else None,
        torch.tensor([[1, *grid] for grid in grids]) if grids else None,
        "",
    )


def group_of(prompt: Prompt, lengths: Sequence[int], *, old: bool = True) -> TrainingGroup:
    """Random completions, advantages, weights and π_old; one token in six is masked out."""
    draw = torch.Generator().manual_seed(100 + prompt.row_id)
    completions = tuple(
        Completion(
            prompt.row_id, i, torch.randint(3, IMAGE, (n,), generator=draw), "", "stop",
            torch.zeros(n), -4 + torch.randn(n, generator=draw),
        )
        for i, n in enumerate(lengths)
    )  # fmt: skip
    return TrainingGroup(
        prompt,
        completions,
        torch.randn(len(lengths), generator=draw),
        tuple(torch.rand(1, generator=draw).expand(n) / 10 for n in lengths),
        tuple(torch.rand(n, generator=draw) > 1 / 6 for n in lengths),
        tuple(-4 + torch.randn(n, generator=draw) for n in lengths) if old else None,
    )


def text_groups(old: bool = True) -> list[TrainingGroup]:
    sizes = [(7, (5, 1, 3)), (12, (1, 1)), (3, (8, 2, 6, 4))]
    return [group_of(prompt_of(row, length), lengths, old=old) for row, (length, lengths) in enumerate(sizes)]


def mixed_groups(old: bool = True) -> list[TrainingGroup]:
    """One picture, none, several of different sizes."""
    prompts = [prompt_of(10, 7, [(4, 6)]), prompt_of(11, 5), prompt_of(12, 9, [(2, 2), (6, 4)]), prompt_of(13, 4)]
    lengths = [(5, 1, 3), (4, 6), (1, 7, 2, 2), (1,)]
    return [group_of(prompt, sizes, old=old) for prompt, sizes in zip(prompts, lengths, strict=True)]


def moved(model: Any) -> Any:
    """The frozen reference: weights a little off the policy's."""
    other = copy.deepcopy(model).requires_grad_(False)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=draw))
    return other.eval()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def counted(**modules: Any) -> Counter[str]:
    """How often each is called from now on."""
    calls = Counter[str]()
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def packed(model: Any, params: LossParams, budget: int = EVERYTHING, **options: Any) -> PackedUpdater:
    return PackedUpdater(model, params, token_budget=budget, temperature=TEMPERATURE, **options)


def naive(model: Any, params: LossParams, reference_model: Any = None) -> PlainUpdater:
    return PlainUpdater(model, params, micro_batch_size=3, temperature=TEMPERATURE, reference_model=reference_model)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """‖ours − theirs‖ ≤ tolerance ‖theirs‖ for every parameter; a gradient that is 0 but for rounding against all."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.norm().item() for gradient in theirs.values())
    assert largest > 1e-3
    for name, gradient in theirs.items():
        scale = max(gradient.norm().item(), 1e-3 * largest)
        assert (ours[name] - gradient).norm().item() <= tolerance * scale, name


def assert_same_update(model: Any, ours: PackedUpdater, theirs: PlainUpdater, groups: list[TrainingGroup]) -> None:
    result = ours.accumulate(groups)
    found = gradients(model)
    expected = theirs.accumulate(groups)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-6)
    assert_same_gradients(found, gradients(model))
    for got, wanted in ((result.metrics, expected.metrics), (result.mismatch, expected.mismatch)):
        for name in wanted._fields:
            assert getattr(got, name).item() == pytest.approx(getattr(wanted, name).item(), rel=1e-4, abs=1e-5), name


PARAMS = {
    "clipped": LossParams(beta=0.04),
    "clipped, sequence": LossParams(level="sequence", epsilon_high=0.3, delta=1.5),
    "clipped, no KL": LossParams(epsilon_high=0.28),
    "bias-corrected": LossParams(beta=0.04, kl_bias_correction=True),
    "cispo": LossParams("cispo", epsilon_high=4.0, beta=0.04),
    "cispo, sequence": LossParams("cispo", "sequence", epsilon_high=4.0),
    "sapo": LossParams("sapo"),
    "sapo, sequence": LossParams("sapo", "sequence", beta=0.04),
}


@pytest.mark.parametrize("loss", PARAMS)
def test_every_loss(model_of: Any, loss: str) -> None:
    model = model_of("qwen2_vl")
    reference, params = moved(model), PARAMS[loss]
    assert_same_update(
        model, packed(model, params, reference_model=reference), naive(model, params, reference), mixed_groups()
    )


@pytest.mark.parametrize(
    ("family", "loss", "budget"),
    [
        ("qwen2_5_vl", "clipped", EVERYTHING),
        ("qwen2_5_vl", "clipped, sequence", 40),
        ("qwen2", "clipped", EVERYTHING),
        ("qwen2", "sapo, sequence", 12),
        ("qwen3", "clipped", 1),
        ("qwen3", "cispo", 25),
        ("llama", "bias-corrected", EVERYTHING),
        ("llama", "clipped, sequence", 1),
    ],
)
def test_every_family(model_of: Any, family: str, loss: str, budget: int) -> None:
    model = model_of(family)
    reference, params = moved(model), PARAMS[loss]
    ours, theirs = packed(model, params, budget, reference_model=reference), naive(model, params, reference)
    assert_same_update(model, ours, theirs, mixed_groups() if family.endswith("vl") else text_groups())


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
@pytest.mark.parametrize("budget", [1, 20, 33, 60])
def test_the_budget_has_no_influence(model_of: Any, family: str, budget: int) -> None:
    model, params = model_of(family), PARAMS["clipped"]
    reference = moved(model)
    groups = mixed_groups() if family == "qwen2_vl" else text_groups()
    whole, found = packed(model, params, reference_model=reference).accumulate(groups), gradients(model)
    passes = counted(policy=model, reference=reference)
    parts = packed(model, params, budget, reference_model=reference).accumulate(groups)
    assert passes["reference"] <= -(-passes["policy"] // 2) or budget == 1
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-6)
    assert parts.metrics.kl_sum.item() == pytest.approx(whole.metrics.kl_sum.item(), rel=1e-4)
    assert_same_gradients(gradients(model), found)


def test_a_reference_that_was_asked_before_is_not_asked_again(model_of: Any) -> None:
    model, groups = model_of("qwen2_vl"), mixed_groups()
    updater = packed(model, PARAMS["clipped"], reference_model=moved(model))
    _, found = updater.accumulate(groups), gradients(model)
    known = updater.with_reference([(g.prompt, g.completions) for g in groups], [m for g in groups for m in g.masks])
    passes = counted(reference=updater.reference_model)
    updater.accumulate([replace(g, completions=one.completions) for g, one in zip(groups, known, strict=True)])
    assert passes["reference"] == 0
    assert_same_gradients(gradients(model), found)


@pytest.mark.parametrize(
    "groups", [mixed_groups()[:1], mixed_groups()[1:2], mixed_groups()[2:3], mixed_groups(old=False)]
)
def test_one_several_and_no_pictures_and_no_old_logprobs(model_of: Any, groups: list[TrainingGroup]) -> None:
    model, params = model_of("qwen2_vl"), PARAMS["clipped, no KL"]
    if groups[0].old_logprobs is None:  # ratio 1: nothing is clipped, and with beta 0 nothing else has a gradient
        groups = groups[:3]
    assert_same_update(model, packed(model, params), naive(model, params), groups)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_gradient_checkpointing(model_of: Any, family: str, reentrant: bool) -> None:
    model, params = model_of(family).train(), PARAMS["clipped"]
    groups, reference = (mixed_groups() if family == "qwen2_vl" else text_groups()), moved(model)
    expected = naive(model, params, reference).accumulate(groups)
    theirs = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    result = packed(model, params, reference_model=reference).accumulate(groups)
    assert model.is_gradient_checkpointing
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-6)
    assert_same_gradients(gradients(model), theirs)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj", "lm_head"]])
def test_adapters(model_of: Any, targets: list[str]) -> None:
    config = LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model, params = get_peft_model(model_of("qwen2_vl"), config), PARAMS["clipped"]
    assert_same_update(model, packed(model, params), naive(model, params), mixed_groups())


@pytest.mark.parametrize("backend", ["math", "cpu"])
def test_forced_attention(model_of: Any, backend: str) -> None:
    model, params = model_of("qwen2"), PARAMS["clipped, no KL"]
    assert_same_update(model, packed(model, params, attn_backend=backend), naive(model, params), text_groups())


def test_autocast(model_of: Any) -> None:
    """Gradients are as close to float32's as the naive path's with its products rounded to bf16 at random."""
    model, params, groups = model_of("qwen2"), PARAMS["clipped"], text_groups()
    found = []
    rounded, autocast = RoundedAtRandom(torch.bfloat16, PRODUCTS, seed=0), torch.autocast("cpu", torch.bfloat16)
    for make, precision in ((naive, nullcontext()), (naive, rounded), (packed, autocast)):
        with precision:
            make(model, params, reference_model=model).accumulate(groups)
        found.append(gradients(model))
    truth, *others = ({name: value.double() for name, value in one.items()} for one in found)
    allowed, error = (math.sqrt(sum((one[n] - truth[n]).square().sum() for n in truth)) for one in others)
    assert 0 < error <= allowed


def test_logprobs_come_back_in_order(model_of: Any) -> None:
    model, groups = model_of("qwen2_vl"), mixed_groups()
    for budget in (1, 30, EVERYTHING):
        ours = packed(model, PARAMS["clipped"], budget, reference_model=model).logprobs(groups)
        theirs = naive(model, PARAMS["clipped"]).logprobs(groups)
        for mine, wanted in zip(ours, theirs, strict=True):
            assert len(mine) == len(wanted)
            for piece, other in zip(mine, wanted, strict=True):
                assert torch.allclose(piece, other, atol=1e-5)
                assert not piece.requires_grad


def without_advantage(group: TrainingGroup) -> TrainingGroup:
    return replace(group, advantages=torch.zeros_like(group.advantages))


def test_what_has_no_gradient_takes_no_part(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = model_of("qwen2_vl"), PARAMS["clipped, no KL"]
    groups = mixed_groups()
    groups[2] = without_advantage(groups[2])
    some = groups[0].advantages.clone()
    some[1] = 0.0
    groups[0] = replace(groups[0], advantages=some, masks=(*groups[0].masks[:2], torch.zeros(3, dtype=torch.bool)))
    naive(model, params).accumulate(groups)
    theirs = gradients(model)
    seen = []
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs) or type(model).forward(model, **inputs))
    result = packed(model, params).accumulate(groups)
    assert_same_gradients(gradients(model), theirs)
    left = [(groups[0], [0]), (groups[1], [0, 1]), (groups[3], [0])]
    tokens = sum(len(g.prompt.input_ids) + sum(len(g.completions[i].token_ids) - 1 for i in kept) for g, kept in left)
    assert [inputs["input_ids"].numel() for inputs in seen] == [tokens]
    assert seen[0]["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert result.metrics.token_count.item() == sum(int(g.masks[i].sum()) for g, kept in left for i in kept)


@pytest.mark.parametrize("groups", [[], [without_advantage(group) for group in mixed_groups()]])
def test_all_skipped_leaves_no_gradients(model_of: Any, groups: list[TrainingGroup]) -> None:
    model = model_of("qwen2_vl")
    result = packed(model, PARAMS["clipped, no KL"]).accumulate(groups)
    assert gradients(model) == {}
    assert result.loss.item() == result.metrics.token_count.item() == result.mismatch.token_count.item() == 0


def test_a_masked_completion_has_no_influence(model_of: Any) -> None:
    model, params, groups = model_of("qwen2_vl"), PARAMS["clipped"], mixed_groups()
    reference = moved(model)
    groups[0] = replace(groups[0], masks=(torch.zeros(5, dtype=torch.bool), *groups[0].masks[1:]))
    poisoned = tuple(torch.full_like(o, math.nan) if i == 0 else o for i, o in enumerate(groups[0].old_logprobs or ()))
    ours = packed(model, params, reference_model=reference)
    assert_same_update(model, ours, naive(model, params, reference), groups)
    ours.accumulate(groups)
    before = gradients(model)
    ours.accumulate([replace(groups[0], old_logprobs=poisoned), *groups[1:]])
    assert_same_gradients(gradients(model), before, tolerance=0.0)


@pytest.mark.parametrize("budget", [1, EVERYTHING])
@pytest.mark.parametrize("frozen", ["vision", "language"])
def test_frozen_parts_get_no_gradient(model_of: Any, frozen: str, budget: int) -> None:
    model, params = model_of("qwen2_vl"), PARAMS["clipped, no KL"]
    part = model.model.visual if frozen == "vision" else model.model.language_model
    part.requires_grad_(False)
    if frozen == "vision":
        model.model.visual.merger.requires_grad_(True)
    else:
        model.lm_head.requires_grad_(False)
    packed(model, params, budget).accumulate(mixed_groups())
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    PlainUpdater(model, params, micro_batch_size=20, temperature=TEMPERATURE).accumulate(mixed_groups())
    assert_same_gradients(found, gradients(model))


def test_the_model_is_left_as_it_was(model_of: Any) -> None:
    model, groups = model_of("qwen2_vl"), mixed_groups()
    attention, names = model.config.get_text_config()._attn_implementation, set(vars(model.lm_head))
    packed(model, PARAMS["clipped, no KL"]).accumulate(groups)
    assert model.config.get_text_config()._attn_implementation == attention
    assert set(vars(model.lm_head)) == names


def test_stale_positions_of_a_rollout_do_not_leak(model_of: Any) -> None:
    model, params, groups = model_of("qwen2_vl"), PARAMS["clipped, no KL"], mixed_groups()
    model.model.rope_deltas = torch.tensor([[17]])
    assert_same_update(model, packed(model, params), naive(model, params), groups)
