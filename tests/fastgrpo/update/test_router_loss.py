"""The load-balancing loss of mixtures of experts: transformers' own, over the tokens of each micro-batch."""

from typing import Any

import pytest
import torch
from family_parity import training_groups
from fastgrpo_kernels import LossParams
from peft import LoraConfig, get_peft_model
from tiny_families import family
from torch import Tensor

from fastgrpo.model.router_loss import router_coefficient
from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import Completion, TrainingGroup
from fastgrpo.update.packing import pack
from fastgrpo.update.updater import PackedUpdater

COEFFICIENT = 0.5


def balanced_alone(groups: list[TrainingGroup]) -> list[TrainingGroup]:
    """A group for each completion, of which no token weighs anything: what is left is the load-balancing loss."""

    def group_of(group: TrainingGroup, completion: Completion) -> TrainingGroup:
        count = len(completion.token_ids)
        one = Completion(
            completion.row_id, 0, completion.token_ids, "", "length", torch.zeros(count), torch.zeros(count)
        )
        return TrainingGroup(group.prompt, (one,), torch.zeros(1), (torch.zeros(count),), (torch.ones(count).bool(),))

    return [group_of(group, completion) for group in groups for completion in group.completions]


@pytest.fixture
def mixture() -> tuple[Any, list[TrainingGroup]]:
    model, prompts = family("Qwen3-MoE")
    return model, balanced_alone(training_groups(prompts))


def own_loss(model: Any, input_ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=input_ids[None], output_router_logits=True, use_cache=False).aux_loss
    return loss


def test_its_gradient_is_transformers(mixture: tuple[Any, list[TrainingGroup]]) -> None:
    """Of one completion: its packed tokens are those of the sequence, in their order."""
    model, groups = mixture
    PackedUpdater(model, LossParams(), token_budget=10**6, router_coefficient=COEFFICIENT).accumulate(groups[:1])
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (batch,) = pack(groups[:1], 10**6, skip_beta=None)
    (COEFFICIENT * own_loss(model, batch.input_ids)).backward()
    routers = [name for name in found if "gate.weight" in name]
    assert min(found[name].norm() for name in routers) > 1e-4
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("adapters", [False, True])
def test_micro_batches_count_by_their_tokens(mixture: tuple[Any, list[TrainingGroup]], adapters: bool) -> None:
    model, groups = mixture
    batches = pack(groups, 1, skip_beta=None)
    assert len(batches) == len(groups)
    with torch.no_grad():
        losses = torch.stack([own_loss(model, batch.input_ids) for batch in batches])
    tokens = torch.tensor([float(len(batch.input_ids)) for batch in batches])
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    result = PackedUpdater(model, LossParams(), token_budget=1, router_coefficient=COEFFICIENT).accumulate(groups)
    expected = float(losses @ tokens / tokens.sum())
    assert float(result.terms.router_sum) == pytest.approx(expected, rel=1e-4)
    assert float(result.loss) == pytest.approx(COEFFICIENT * expected, rel=1e-4)


def test_padded_batches_leave_padding_out(mixture: tuple[Any, list[TrainingGroup]]) -> None:
    model, groups = mixture
    updater = PlainUpdater(model, LossParams(), micro_batch_size=2, router_coefficient=COEFFICIENT)
    alone = PlainUpdater(model, LossParams(), micro_batch_size=1, router_coefficient=COEFFICIENT)
    same = [groups[0]] * 2
    assert float(updater.measure(same).terms.router_sum) == pytest.approx(
        float(alone.measure(same).terms.router_sum), rel=1e-4
    )
    with torch.no_grad():
        whole = own_loss(model, torch.cat([groups[0].prompt.input_ids, groups[0].completions[0].token_ids]))
    assert float(alone.measure(same).terms.router_sum) == pytest.approx(float(whole), rel=1e-4)


def test_a_vision_language_mixture() -> None:
    model, prompts = family("Qwen3-VL-MoE")
    updater = PackedUpdater(model, LossParams(), token_budget=10**6, router_coefficient=COEFFICIENT)
    assert float(updater.accumulate(training_groups(prompts)).terms.router_sum) > 0


@pytest.mark.parametrize(("given", "expected"), [(None, 0.001), (0.0, 0.0), (0.3, 0.3)])
def test_the_coefficient_is_the_models_own_unless_given(given: float | None, expected: float) -> None:
    assert router_coefficient(family("Qwen3-MoE")[0], given) == expected


def test_one_for_a_model_without_experts_is_refused() -> None:
    model = family("Qwen3")[0]
    assert router_coefficient(model, None) == router_coefficient(model, 0.0) == 0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1: Qwen3ForCausalLM is no mixture of experts"):
        router_coefficient(model, 0.1)
