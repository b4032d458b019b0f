import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_forward import hf_logits
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.plain.updater import PlainUpdater, sequence_positions
from fastgrpo.types import Completion, Prompt, ScoredRollout, TrainingGroup
from fastgrpo.update.objective import loss_params
from fastgrpo.update.plan import plan_updates


@pytest.mark.parametrize("name", ["one image", "two images", "no image"])
def test_positions_equal_those_of_transformers(vlm: Any, prompts: dict[str, Prompt], name: str) -> None:
    prompt = prompts[name]
    token_ids = torch.tensor([1, 2, 3, 4])
    ids = torch.cat([prompt.input_ids, token_ids])[None]
    theirs, _ = vlm.model.get_rope_index(
        ids, mm_token_type_ids=(ids == vlm.config.image_token_id).int(), image_grid_thw=prompt.image_grid_thw
    )
    assert torch.equal(sequence_positions(prompt, 4), theirs[:, 0])
    assert torch.equal(prompt.position_ids, theirs[:, 0, :-4])


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


def make_groups(model: Any, prompts: list[Prompt], config: GRPOConfig, old_noise: float = 0.2) -> list[TrainingGroup]:
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
        rollout.append(ScoredRollout(prompt, tuple(completions), torch.zeros(2, 1)))
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


def expected_loss(model: Any, reference: Any, groups: list[TrainingGroup], config: GRPOConfig) -> Tensor:
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


def updater_of(model: Any, config: GRPOConfig, reference: Any = None, micro_batch_size: int = 2) -> PlainUpdater:
    return PlainUpdater(
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
    result = updater_of(vlm, config, reference).accumulate(groups)
    ours = gradients(vlm)
    expected = expected_loss(vlm, reference, groups, config)
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    assert not result.loss.requires_grad
    assert_same_gradients(ours, gradients(vlm))
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_metrics_of_an_update(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, reference = settings(beta=0.04, use_bias_correction_kl=False), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config, old_noise=0.0)
    result = updater_of(vlm, config, reference, micro_batch_size=4).accumulate(groups)
    entropy, kl, count = 0.0, 0.0, 0
    for group in groups:
        for completion, mask in zip(group.completions, group.masks, strict=True):
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
    metrics, mismatch = result.metrics, result.mismatch
    assert metrics.token_count.item() == mismatch.token_count.item() == count
    assert metrics.entropy_sum.item() == pytest.approx(entropy, rel=1e-5)
    assert metrics.kl_sum.item() == pytest.approx(kl, rel=1e-4)
    # Every token was drawn half a nat below the log-prob of the policy that drew it.
    assert mismatch.difference_sum.item() == pytest.approx(0.5 * count, rel=1e-4)
    assert mismatch.difference_max.item() == pytest.approx(0.5, abs=1e-4)
    assert mismatch.ratio_min.item() == pytest.approx(math.exp(0.5), rel=1e-4)


def test_without_old_logprobs_the_ratio_is_one(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config = settings(loss_type="grpo")
    groups = make_groups(vlm, list(prompts.values()), config, old_noise=0.0)
    updater = updater_of(vlm, config)
    updater.accumulate(groups)
    stated = gradients(vlm)
    result = updater.accumulate([replace(group, old_logprobs=None) for group in groups])
    assert_same_gradients(gradients(vlm), stated)
    assert result.metrics.clip_region_sum.item() == 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_gradients_do_not_depend_on_the_micro_batch(vlm: Any, prompts: dict[str, Prompt], loss_type: str) -> None:
    config, reference = settings(loss_type=loss_type, beta=0.04), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    losses, found = [], []
    for size in (1, 4, 6):
        result = updater_of(vlm, config, reference, micro_batch_size=size).accumulate(groups)
        losses.append(result.loss.item())
        found.append(gradients(vlm))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])


def test_gradients_add_up_over_calls(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config = settings(loss_type="dapo")
    groups = make_groups(vlm, list(prompts.values()), config)
    updater = updater_of(vlm, config)
    updater.accumulate(groups)
    at_once = gradients(vlm)
    for group in groups:
        updater.accumulate([group])
    assert_same_gradients(gradients(vlm), at_once)


def test_logprobs_are_the_policys(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config = settings()
    groups = make_groups(vlm, list(prompts.values()), config)
    found = updater_of(vlm, config, micro_batch_size=4).logprobs(groups)
    for group, pieces in zip(groups, found, strict=True):
        for completion, logprobs in zip(group.completions, pieces, strict=True):
            assert torch.allclose(logprobs, completion.logprobs, atol=1e-5)
            assert not logprobs.requires_grad


def test_a_masked_completion_has_no_influence(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, reference = settings(loss_type="grpo", beta=0.04), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    updater = updater_of(vlm, config, reference)
    updater.accumulate(groups)
    before = gradients(vlm)
    g, index = MASKED_OUT
    completions, old = list(groups[g].completions), list(groups[g].old_logprobs or ())
    completions[index] = replace(completions[index], token_ids=completions[index].token_ids.flip(0) + 1)
    old[index] = torch.full_like(old[index], math.nan)
    groups[g] = replace(groups[g], completions=tuple(completions), old_logprobs=tuple(old))
    updater.accumulate(groups)
    assert_same_gradients(gradients(vlm), before)


def test_no_groups_leave_no_gradients(vlm: Any) -> None:
    updater = updater_of(vlm, settings(beta=0.04), reference=vlm)
    result = updater.accumulate([])
    assert result.loss.item() == 0.0
    assert result.metrics.token_count.item() == result.mismatch.token_count.item() == 0
    assert gradients(vlm) == {}
    assert updater.logprobs([]) == []


def test_gradient_checkpointing_changes_nothing(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, reference = settings(loss_type="grpo", beta=0.04), moved(vlm)
    groups = make_groups(vlm, list(prompts.values()), config)
    updater = updater_of(vlm.train(), config, reference)
    updater.accumulate(groups)
    plain = gradients(vlm)
    vlm.gradient_checkpointing_enable()
    updater.accumulate(groups)
    assert vlm.is_gradient_checkpointing
    assert_same_gradients(gradients(vlm), plain)


def test_text_models(text_model: Any, text_prompts: list[Prompt]) -> None:
    config, reference = settings(loss_type="grpo", beta=0.04), moved(text_model)
    groups = make_groups(text_model, text_prompts, config)
    result = updater_of(text_model, config, reference, micro_batch_size=4).accumulate(groups)
    ours = gradients(text_model)
    expected = expected_loss(text_model, reference, groups, config)
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(text_model))


def test_the_reference_of_adapters_is_the_model_without_them(vlm: Any, prompts: dict[str, Prompt]) -> None:
    config, base = settings(loss_type="grpo", beta=0.5), copy.deepcopy(vlm)
    model = get_peft_model(vlm, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    groups = make_groups(model, list(prompts.values()), config)
    adapters_off = updater_of(model, config).accumulate(groups)
    ours = gradients(model)
    assert ours
    assert all("lora_" in name for name in ours)
    separate = updater_of(model, config, base).accumulate(groups)
    assert adapters_off.metrics.kl_sum.item() > 0.01
    assert adapters_off.loss.item() == pytest.approx(separate.loss.item(), rel=1e-6)
    assert_same_gradients(ours, gradients(model))
