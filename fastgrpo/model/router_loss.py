"""The load-balancing loss of a mixture of experts, as transformers computes it of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastgrpo.model.families import base_model, unwrap


def router_coefficient(model: Any, given: float | None) -> float:
    """What a model's load-balancing loss is weighed by: as `given`, else as its config says; 0 without such a loss.

    Raises:
        ValueError: one is given for a model that has no such loss.
    """
    text = base_model(model).config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        if given:
            raise ValueError(
                f"router_aux_loss_coef={given}: {type(base_model(model)).__name__} is no mixture of experts whose "
                "routers transformers reads. Leave it unset."
            )
        return 0.0
    return float(getattr(text, "router_aux_loss_coef", 0.0) if given is None else given)


@contextmanager
def caught_router_losses(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Within this context every forward pass appends its load-balancing loss to the list, if `wanted`."""
    caught: list[Tensor] = []
    if not wanted:
        yield caught
        return
    called = unwrap(model)  # peft calls the model inside past its hooks
    handles = [
        called.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"output_router_logits": True}), with_kwargs=True
        ),
        called.register_forward_hook(lambda module, _, output: caught.append(_of(module, output))),
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _of(model: Any, output: Any) -> Tensor:
    loss: Tensor | None = getattr(output, "aux_loss", None)
    if loss is None:
        raise ValueError(f"router_aux_loss_coef: {type(base_model(model)).__name__} has no load-balancing loss: set 0.")
    return loss
