"""What goes around micro-batches, where the policies' own tests do not reach."""

import pytest
import torch
from accelerate import Accelerator

from fastgrpo.update.accumulation import GradientAccumulation


@pytest.fixture
def accelerator() -> Accelerator:
    """As on a CUDA device in fp16."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return accelerator


@pytest.mark.parametrize("steps", [(False, True, False, False, True), (True, False, True)])
def test_loss_scaling_survives_steps_without_gradients(accelerator: Accelerator, steps: tuple[bool, ...]) -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    accumulation = GradientAccumulation(accelerator)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    data = torch.tensor([[1.0, 2.0, 3.0]])
    for has_gradient in steps:
        before = model.weight.detach().clone()
        if has_gradient:
            accumulation.backward(model, model(data).sum())
        accelerator.scaler.unscale_(optimizer.optimizer)  # as clipping does
        optimizer.step()
        assert not optimizer.step_was_skipped, "the schedule goes on"
        torch.testing.assert_close(model.weight, before - 0.5 * data if has_gradient else before)
        optimizer.zero_grad()
    assert accelerator.scaler.get_scale() == 8.0


def test_overflows_are_still_found(accelerator: Accelerator) -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    accumulation = GradientAccumulation(accelerator)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    before = model.weight.detach().clone()
    accumulation.backward(model, model(torch.full((1, 3), torch.inf)).sum())
    optimizer.step()
    assert optimizer.step_was_skipped
    assert torch.equal(model.weight, before)
    assert accelerator.scaler.get_scale() == 4.0
