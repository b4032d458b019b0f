"""The policy's update on packed groups: shared prompts once, no padding, one process or many.

`PackedUpdater` computes the same gradients as `fastgrpo.plain.updater.PlainUpdater`, faster.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LossParams
from fastgrpo_profiling import span
from torch import Tensor
from transformers import PreTrainedModel

from fastgrpo.model.families import unwrap
from fastgrpo.model.router_loss import caught_router_losses
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.types import Rollout, TrainingGroup, UpdateResult
from fastgrpo.update.accumulation import frozen_reference
from fastgrpo.update.micro_loss import MicroBatchResult, Scaling, micro_loss, update_result, with_router_loss
from fastgrpo.update.packed_passes import PackedPasses
from fastgrpo.update.packing import PackedBatch, pack, takes_part

NO_GRAD_BATCHES = 4
"""How many micro-batches' tokens go through a model at once where no gradients are wanted."""


class PackedUpdater(PackedPasses):
    """`Updater` on a transformers model: micro-batches packed to `token_budget` input tokens.

    With beta 0 and no entropy bonus, completions that cannot have a gradient (advantage 0) are left out, also of the
    update's metrics: entropy, clip ratios and the sampling mismatch are then means over the tokens trained on. Those
    without a counted token are always left out; they are in no metric anyway.

    The frozen reference of the KL term is `reference_model`, or the model itself with its adapters off (peft).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss_params: LossParams,
        *,
        token_budget: int,
        temperature: float = 1.0,
        reference_model: PreTrainedModel | None = None,
        accelerator: Accelerator | None = None,
        attn_backend: str = "auto",
        logprob_bytes: int | None = None,
        vision_cache: VisionCache | None = None,
        scaling: Scaling | None = None,
        float32_head: bool = False,
        router_coefficient: float = 0.0,
    ) -> None:
        """See `PackedPasses`.

        Args:
            scaling: further factors of the surrogate.
            router_coefficient: of a mixture of experts' load-balancing loss, to which every completion contributes.
        """
        super().__init__(
            model,
            token_budget=token_budget,
            temperature=temperature,
            accelerator=accelerator,
            attn_backend=attn_backend,
            logprob_bytes=logprob_bytes,
            vision_cache=vision_cache,
            float32_head=float32_head,
        )
        self.loss_params = loss_params
        self.reference_model = reference_model
        self.scaling = scaling or Scaling()
        self.router_coefficient = router_coefficient
        self._tokens = 0
        """Of the optimizer step's micro-batches on this rank."""

    @torch.no_grad()
    def with_reference(self, rollouts: Sequence[Rollout], masks: Sequence[Tensor]) -> list[Rollout]:
        """See `Updater.with_reference`."""
        if self.loss_params.beta == 0.0:
            return list(rollouts)
        groups, left = [], iter(masks)
        for prompt, completions in rollouts:
            own = tuple(islice(left, len(completions)))
            nothing = tuple(torch.zeros(len(mask)) for mask in own)
            groups.append(TrainingGroup(prompt, completions, torch.zeros(len(own)), nothing, own))
        with self.fast_layers(self.reference_model):
            return [Rollout(group.prompt, group.completions) for group in self._asked(groups, self._skip_beta)]

    def logprobs(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """See `Updater.logprobs`."""
        return self._without_gradient(groups, entropy=False)

    def entropies(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """See `Updater.entropies`."""
        return self._without_gradient(groups, entropy=True)

    @torch.no_grad()
    def _without_gradient(self, groups: Sequence[TrainingGroup], *, entropy: bool) -> list[tuple[Tensor, ...]]:
        """Per group, G tensors [C] float32: log-probs, or entropies."""
        with self.fast_layers(self.reference_model):
            # Not through DDP, whose forward broadcasts buffers.
            pieces = self._pieces(unwrap(self.model), groups, skip_beta=None, entropy=entropy)
        return [tuple(pieces[g, i] for i in range(len(group.completions))) for g, group in enumerate(groups)]

    def accumulate(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """See `Updater.accumulate`. With several processes, all of them must call it, with groups or without."""
        with self.fast_layers(self.reference_model):
            batches = self._micro_batches(self._asked(groups, self._skip_beta), self._skip_beta)
            outputs = self.each(batches, self._micro_step)
        return update_result(outputs, self.device)

    @torch.no_grad()
    def measure(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """See `Updater.measure`. No completion is left out."""
        with self.fast_layers(self.reference_model):
            batches = self._micro_batches(self._asked(groups, skip_beta=None), skip_beta=None)
            outputs = [self._losses(unwrap(self.model), batch.to(self.device)) for batch in batches]
        return update_result(outputs, self.device)

    def _micro_step(self, batch: PackedBatch) -> MicroBatchResult:
        result = self._losses(self.model, batch)
        with span("update/backward"):
            self.accumulation.backward(self.model, result.loss)
        return result

    def _losses(self, model: Any, batch: PackedBatch) -> MicroBatchResult:
        with span("update/forward"):
            with caught_router_losses(model, bool(self.router_coefficient and batch.owners)) as caught:
                logprobs, entropy = self.forward(model, batch, entropy=True)
            assert entropy is not None
            result = micro_loss(logprobs, entropy, batch, self.loss_params, self.scaling, batch.ref_logprobs)
            share = len(batch.input_ids) / max(self._tokens, 1) / self.accumulation.ranks
            return with_router_loss(result, caught, self.router_coefficient, share)

    def _micro_batches(self, groups: Sequence[TrainingGroup], skip_beta: float | None) -> list[PackedBatch]:
        with span("update/pack"):
            batches = pack(groups, self.token_budget, skip_beta=skip_beta, dummy_image=self.dummy_image)
            self._tokens = sum(len(batch.input_ids) for batch in batches)
            return self.even(batches)

    @property
    def _skip_beta(self) -> float | None:
        """For `pack`."""
        return None if self.router_coefficient else self.loss_params.beta

    @torch.no_grad()
    def _asked(self, groups: Sequence[TrainingGroup], skip_beta: float | None) -> list[TrainingGroup]:
        """The groups with the reference's log-probs, for which it is asked on all ranks if some rank lacks any."""
        if self.loss_params.beta == 0.0:
            return list(groups)
        known = all(
            completion.ref_logprobs is not None or not takes_part(group, i, skip_beta)
            for group in groups
            for i, completion in enumerate(group.completions)
        )
        if not self.accumulation.most(int(not known), self.device):
            return list(groups)
        with span("update/reference_model"), frozen_reference(self.model, self.reference_model) as model:
            pieces = self._pieces(model, groups, skip_beta, entropy=False)
        return [
            replace(
                group,
                completions=tuple(replace(c, ref_logprobs=pieces.get((g, i))) for i, c in enumerate(group.completions)),
            )
            for g, group in enumerate(groups)
        ]

    def _pieces(
        self, model: Any, groups: Sequence[TrainingGroup], skip_beta: float | None, *, entropy: bool
    ) -> dict[tuple[int, int], Tensor]:
        """[C] float32 of each completion, by its group and its index there: log-probs, or entropies.

        A pass without gradients keeps one layer's activations at a time, so its batches hold more tokens.
        """
        budget = NO_GRAD_BATCHES * self.token_budget
        found: dict[tuple[int, int], Tensor] = {}
        for batch in self.even(pack(groups, budget, skip_beta=skip_beta, dummy_image=self.dummy_image)):
            own = batch.to(next(model.parameters()).device)  # the reference may stay on the host
            output = self.forward(model, own, entropy=entropy)
            flat = output.logprobs if output.entropy is None else output.entropy
            found.update(zip(batch.owners, batch.split(flat), strict=False))
        return found
