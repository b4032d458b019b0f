"""Gradient accumulation: many micro-batches, one optimizer step, on one process, DDP or DeepSpeed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastgrpo.model.families import unwrap


class GradientAccumulation:
    """Accumulates gradients over micro-batches; processes exchange them in the last one only.

    Methods take the model as the trainer wraps it: plain, in DDP, or a DeepSpeed engine.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self.accelerator = accelerator
        self.ranks = 1 if accelerator is None else accelerator.num_processes
        if accelerator is not None and type(accelerator.scaler) is torch.amp.GradScaler:
            accelerator.scaler = GradScaler.like(accelerator.scaler, accelerator.device)

    def most(self, count: int, device: torch.device) -> int:
        """The largest `count` of any process. Each must run that many micro-batches, since collectives inside them
        wait for all processes. Every process must call it."""
        if self.ranks == 1:
            return count
        counts = torch.tensor(count, device=device)
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
        return int(counts)

    def micro_batch(self, model: Any, *, is_last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward pass."""
        if is_deepspeed(model):
            model.set_gradient_accumulation_boundary(is_last)
        elif self.accelerator is not None and not is_last:
            context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
            return context
        return nullcontext()

    def backward(self, model: Any, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch; `loss` is its share of the loss over all processes."""
        if not loss.requires_grad:  # a batch of text only, and only the vision tower trains
            return
        if self.accelerator is None:
            loss.backward()
        elif is_deepspeed(model):
            # accelerate's own backward would step the engine after every micro-batch.
            model.backward(loss * self.ranks, scale_wrt_gas=False)
        else:
            # Ranks average their gradients; the weights already divide by the whole batch, so undo that mean.
            self.accelerator.backward(loss * self.ranks)

    def step(self, model: Any) -> None:
        """Call after the last micro-batch: DeepSpeed steps here; the caller's `optimizer.step()` then does nothing."""
        if is_deepspeed(model):
            model.step()


class GradScaler(torch.amp.GradScaler):
    """For fp16: torch's own raises if no parameter has a gradient; this one then skips the update."""

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler, device: torch.device) -> "GradScaler":
        """A scaler with the settings of `scaler`, initialised even if the first step has no gradients."""
        own = cls(device.type, enabled=scaler.is_enabled())
        if scaler.is_enabled():
            own.load_state_dict(scaler.state_dict())
            own.scale(torch.zeros(1, device=device))  # torch makes its tensors at the first loss
        return own

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # Per device, whether a gradient was not finite. Without gradients, none was.
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16) or {found_inf.device: found_inf}


def is_deepspeed(model: Any) -> bool:
    """Whether the trainer wrapped the model in a DeepSpeed engine."""
    return hasattr(model, "set_gradient_accumulation_boundary")


@contextmanager
def frozen_reference(model: Any, reference_model: Any | None) -> Iterator[Any]:
    """The reference of the KL term: `reference_model`, or else the model itself with its adapters off (peft)."""
    if reference_model is not None:
        yield reference_model
        return
    with unwrap(model).disable_adapter():
        yield unwrap(model)
