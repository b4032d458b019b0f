"""Supervised fine-tuning's update on packed examples: cross-entropy, no padding, one process or many."""

from collections.abc import Sequence
from typing import Any

import torch
from fastgrpo_profiling import span
from torch import Tensor

from fastgrpo.model.families import unwrap
from fastgrpo.types import Example
from fastgrpo.update.packed_passes import PackedPasses
from fastgrpo.update.packing import PackedBatch, pack_examples


class SupervisedUpdater(PackedPasses):
    """Gradients of the mean cross-entropy of examples' targets, in micro-batches packed to `token_budget` tokens."""

    def accumulate(self, examples: Sequence[Example], total_targets: int) -> Tensor:
        """Adds the gradients of one optimizer step. With several processes, all of them must call it.

        Args:
            total_targets: those of the whole step, over all processes: the mean's denominator.

        Returns:
            [2] float32, on the device: this process's shares of the mean loss and of the mean entropy.
        """
        batches = self._micro_batches(examples, 1 / max(total_targets, 1))
        with self.fast_layers():
            return self._sum(self.each(batches, self._micro_step))

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> Tensor:
        """[2] float32, without gradients: sums over the examples' targets of cross-entropy and entropy."""
        model = unwrap(self.model)  # not through DDP, whose forward broadcasts buffers
        batches = self._micro_batches(examples, 1.0)
        with self.fast_layers():
            return self._sum([self._losses(model, batch.to(self.device))[0] for batch in batches])

    def _micro_batches(self, examples: Sequence[Example], weight: float) -> list[PackedBatch]:
        with span("update/pack"):
            return self.even(pack_examples(examples, self.token_budget, weight=weight, dummy_image=self.dummy_image))

    def _micro_step(self, batch: PackedBatch) -> Tensor:
        with span("update/forward"):
            sums, loss = self._losses(self.model, batch)
        with span("update/backward"):
            self.accumulation.backward(self.model, loss)
        return sums

    def _losses(self, model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[2] detached, weighted cross-entropy and entropy; and the former with its gradient."""
        logprobs, entropy = self.forward(model, batch, entropy=True)
        assert entropy is not None
        loss = -(logprobs * batch.weights).sum()
        return torch.stack([loss.detach(), (entropy.detach() * batch.weights).sum()]), loss

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.zeros(2, device=self.device), *parts]).sum(0)
