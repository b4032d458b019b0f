"""`patches_by_matmul`: what the convolution gives, forward and backward, and only meanwhile."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.model.patch_embed import patches_by_matmul

PATCHES = 5


def tower(bias: bool = False) -> SimpleNamespace:
    """The part of a vision tower that is looked at, in float64."""
    torch.manual_seed(0)
    projection = nn.Conv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=bias).double()
    return SimpleNamespace(patch_embed=SimpleNamespace(proj=projection))


def results(projection: nn.Conv3d, patches: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    patches = patches.clone().requires_grad_()
    out = projection(patches).view(PATCHES, 8)
    inputs = [patches, *projection.parameters()]
    return [out, *torch.autograd.grad((out * torch.arange(8)).sum(), inputs)]


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_the_convolutions(bias: bool) -> None:
    projection = tower(bias).patch_embed.proj
    patches = torch.randn(PATCHES, 3, 2, 4, 4, dtype=torch.float64)
    expected = results(projection, patches)
    with patches_by_matmul(SimpleNamespace(patch_embed=SimpleNamespace(proj=projection))):
        found = results(projection, patches)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_meanwhile_and_hooks_still_run() -> None:
    given = tower()
    projection, calls = given.patch_embed.proj, []
    projection.register_forward_hook(lambda *_: calls.append(1))
    with contextlib.suppress(RuntimeError), patches_by_matmul(given, None):
        projection(torch.randn(PATCHES, 3, 2, 4, 4, dtype=torch.float64))
        projection(torch.randn(PATCHES, 7, dtype=torch.float64))
    assert calls == [1]
    assert "forward" not in vars(projection)


def test_other_layers_are_left_alone() -> None:
    overlapping = SimpleNamespace(patch_embed=SimpleNamespace(proj=nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 2, 2))))
    linear = SimpleNamespace(patch_embed=SimpleNamespace(proj=nn.Linear(3, 8)))
    before = copy.deepcopy(vars(linear.patch_embed.proj))
    with patches_by_matmul(overlapping, linear, SimpleNamespace()):
        assert "forward" not in vars(overlapping.patch_embed.proj)
        assert vars(linear.patch_embed.proj).keys() == before.keys()
