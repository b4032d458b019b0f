"""Half-precision copies of linear layers' weights under autocast, made once for many passes.

Autocast casts float32 weights in every pass (frozen ones at every use) and casts the gradients back, which moves all
weights many times. Here a copy is its own leaf, and its gradient is added to the weight's in one kernel.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.model.replaced_forward import replaced_forward


@contextmanager
def half_weights(*models: Any, trained: bool) -> Iterator[None]:
    """Within this context, linear layers of these models use copies of their float32 weights under autocast.

    Weights must not change inside. Leave it before gradients are read on another thread or clipped.

    Args:
        models: forward *and* backward passes must lie inside.
        trained: whether to copy trainable parameters too. Not with gradient hooks on them (DDP, DeepSpeed): their
            gradients are added outside of autograd, so the hooks would not run.
    """
    with ExitStack() as stack:
        for module in {module for model in models for module in model.modules()}:
            if type(module) is nn.Linear and "forward" not in vars(module):
                parameters = [p for p in (module.weight, module.bias) if p is not None]
                if all(_can_be_copied(p, trained) for p in parameters):
                    stack.enter_context(replaced_forward(module, partial(_linear, module, _Copies())))
        yield


def _can_be_copied(parameter: Tensor, trained: bool) -> bool:
    if parameter.dtype != torch.float32 or hasattr(parameter, "ds_id"):
        return False
    hooked = bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
    return not parameter.requires_grad or (trained and not hooked)


class _Copies:
    """Copies of a layer's weight and bias, made at first use."""

    def __init__(self) -> None:
        self.made: tuple[Tensor, Tensor | None] | None = None

    def of(self, layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self.made is None or self.made[0].dtype != dtype:
            self.made = _copy(layer.weight, dtype), None if layer.bias is None else _copy(layer.bias, dtype)
        return self.made


def _copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    copy = parameter.detach().to(dtype)
    if parameter.requires_grad:
        copy.requires_grad_().register_post_accumulate_grad_hook(partial(_hand_on, parameter))
    return copy


@torch.no_grad()
def _hand_on(parameter: Tensor, copy: Tensor) -> None:
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _linear(layer: nn.Linear, copies: _Copies, x: Tensor) -> Tensor:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return F.linear(x, layer.weight, layer.bias)
    return F.linear(x, *copies.of(layer, torch.get_autocast_dtype(kind)))
