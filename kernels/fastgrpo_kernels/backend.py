"""How a call reaches an implementation, the same for every op.

1. The public function (`grpo_loss`, `sample`, …) checks its inputs and asks `pick_backend`.
2. "triton", for CUDA tensors: it calls an operator made by `register_operator` around the launcher. To torch.compile,
   autograd and fake tensors that is one node, and nothing looks inside.
3. "torch", for all others: it calls the function of the same name in `cpu`, or in `reference` where `cpu` has nothing
   faster. That is plain torch, which a compiler may look into and autograd derives; where the backward pass is written
   by hand (`cpu.linear_logprob`), it is an operator too.

`reference` is what both are tested against.
"""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["torch", "triton"]

VARIABLE = "FASTGRPO_KERNELS"
"""Environment variable that forces a backend: auto (the default), torch or triton."""

_NAMESPACE = "fastgrpo_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def pick_backend(tensor: Tensor, forced: Backend | None = None) -> Backend:
    """Triton for CUDA tensors, else torch; `forced`, or else the environment variable, overrides this.

    Raises:
        ValueError: an unknown backend, or triton for tensors that no GPU holds. (Under TRITON_INTERPRET=1, Triton
            runs on CPU tensors; that is for tests.)
    """
    name = forced or os.environ.get(VARIABLE) or "auto"
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"{VARIABLE}={name!r} is not a backend: use auto, torch or triton.")
    if name == "torch" or (name == "auto" and not tensor.is_cuda):
        return "torch"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend triton needs CUDA tensors, these are on {tensor.device}: use torch or auto.")
    return "triton"


def register_operator(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The operator `torch.ops.fastgrpo_kernels.NAME`, to be called by position.

    Registered by schema, not by `torch.library.custom_op`: a call costs 3 µs instead of 11 to 16 (2-core CPU, torch
    2.13), and a decode step makes two for each layer.

    Args:
        schema: "NAME(Tensor x, …) -> …", with (a!) behind the type of what is written in place.
        run: computes it, on any device.
        fake: the outputs' shapes and dtypes from the inputs'.
        save: (ctx, inputs, output), keeps what `backward` needs.
        backward: (ctx, *gradients of the outputs) → one gradient for each input. Can be differentiated no further.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        once = once_differentiable(backward)
        torch.library.register_autograd(f"{_NAMESPACE}::{name}", once, setup_context=save, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return operator
