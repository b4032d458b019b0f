"""The policy's update on packed groups: shared prompts once, no padding, one process or many.

`PackedPolicy` means what `fastgrpo.reference.ReferencePolicy` means and takes the same gradients, faster.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LogprobOutput, LossOutput, LossParams, grpo_loss
from fastgrpo_profiling import span
from torch import Tensor
from transformers import PreTrainedModel

from fastgrpo.metrics import combine, sampling_mismatch
from fastgrpo.model.packed_forward import (
    company_prompt,
    is_multimodal,
    packed_logprobs,
    require_packed_support,
    unwrap,
)
from fastgrpo.model.patch_embed import patches_by_matmul
from fastgrpo.model.shared_prefix import shared_prefix_layers
from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.packing import PackedBatch, idle_batch, pack
from fastgrpo.types import SamplingMismatch, UpdateResult, WeightedGroup


class PackedPolicy:
    """`Policy` on a transformers model: micro-batches packed to `token_budget` input tokens.

    With beta 0 completions that cannot have a gradient (advantage 0) take no part, and so are in no metric of the
    update: entropy, clip ratios and the sampling mismatch are then means over the tokens trained on. Completions
    without a counted token never take part, and are in no metric anyway.

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
        logprob_bytes: int = 1 << 30,
        vision_cache: VisionCache | None = None,
    ) -> None:
        """
        Args:
            token_budget: input tokens of a micro-batch, prompts counted once.
            attn_backend: see `fastgrpo.model.attention_backends`.
            logprob_bytes: scratch of the LM head, see `linear_logprob`.
            vision_cache: where to keep what the model's frozen vision tower sees; the sampler may share it.

        Raises:
            ValueError: a model family whose attention or head cannot be replaced; the message says what it is. Train
                it with `ReferencePolicy`.
        """
        require_packed_support(unwrap(model))
        self.model = model
        """Called for the forward pass; the trainer puts the module wrapped in DDP or DeepSpeed here."""
        self.loss_params = loss_params
        self.token_budget = token_budget
        self.temperature = temperature
        self.reference_model = reference_model
        self.accelerator = accelerator
        self.attn_backend = attn_backend
        self.logprob_bytes = logprob_bytes
        self.vision_cache = vision_cache
        self.version = 0
        self._ranks = 1 if accelerator is None else accelerator.num_processes
        # Ranks wait for each other's gradients of the vision tower, pictures or not.
        self._company = company_prompt(model) if self._ranks > 1 and is_multimodal(model) else None

    @torch.no_grad()
    def logprobs(self, groups: Sequence[WeightedGroup]) -> list[tuple[Tensor, ...]]:
        """See `Policy.logprobs`."""
        batches = self._micro_batches(groups, skip_beta=None)
        found: list[dict[int, Tensor]] = [{} for _ in groups]
        with self._fast_layers():
            for batch in batches:
                # Not through DDP, whose forward broadcasts buffers.
                flat = self._forward(unwrap(self.model), batch.to(self._device), entropy=False).logprobs
                for (group, index), piece in zip(batch.owners, batch.split(flat), strict=False):
                    found[group][index] = piece
        return [tuple(pieces[i] for i in range(len(pieces))) for pieces in found]

    def accumulate(self, groups: Sequence[WeightedGroup]) -> UpdateResult:
        """See `Policy.accumulate`. With several processes, all of them must call it, with groups or without.

        One number is agreed on between processes beforehand, that of micro-batches; no other value is read here (but
        transformers' vision tower reads its grids).
        """
        batches = self._micro_batches(groups, skip_beta=self.loss_params.beta)
        outputs = []
        with self._fast_layers():
            for i, batch in enumerate(batches):
                with self._micro_batch(is_last=i == len(batches) - 1):
                    outputs.append(self._micro_step(batch.to(self._device)))
        if batches and self._is_deepspeed:
            self.model.step()  # the caller's optimizer.step() does nothing under DeepSpeed
        if not outputs:
            outputs.append(self._nothing())
        return UpdateResult(
            torch.stack([output.loss.detach() for output, _ in outputs]).sum(),
            combine([output.metrics for output, _ in outputs]),
            combine([mismatch for _, mismatch in outputs]),
        )

    def _micro_step(self, batch: PackedBatch) -> tuple[LossOutput, SamplingMismatch]:
        with span("update/reference_model"):
            ref_logprobs = self._reference_logprobs(batch)
        with span("update/forward"):
            logprobs, entropy = self._forward(self.model, batch, entropy=True)
            assert entropy is not None
            output = grpo_loss(
                logprobs,
                batch.advantages,
                batch.weights,
                batch.cu_seqlens,
                self.loss_params,
                old_logprobs=batch.old_logprobs,
                ref_logprobs=ref_logprobs,
                mask=batch.mask,
                entropy=entropy.detach(),
            )
        with span("update/backward"):
            self._backward(output.loss)
        return output, sampling_mismatch(logprobs, batch.sampling_logprobs, batch.mask)

    def _micro_batches(self, groups: Sequence[WeightedGroup], skip_beta: float | None) -> list[PackedBatch]:
        """The same number on every rank: a collective inside a micro-batch waits for all of them."""
        with span("update/pack"):
            batches = pack(groups, self.token_budget, skip_beta=skip_beta, company=self._company)
            if self._ranks == 1:
                return batches
            count = torch.tensor(len(batches), device=self._device)
            torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
            return batches + [idle_batch(self._company)] * (int(count) - len(batches))

    def _forward(self, model: Any, batch: PackedBatch, *, entropy: bool) -> LogprobOutput:
        return packed_logprobs(
            model,
            batch,
            temperature=self.temperature,
            entropy=entropy,
            attn_backend=self.attn_backend,
            logprob_bytes=self.logprob_bytes,
            vision_cache=self.vision_cache,
        )

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.loss_params.beta == 0.0:
            return None
        if self.reference_model is not None:
            return self._forward(self.reference_model, batch, entropy=False).logprobs
        model = unwrap(self.model)
        with model.disable_adapter():
            return self._forward(model, batch, entropy=False).logprobs

    def _nothing(self) -> tuple[LossOutput, SamplingMismatch]:
        """The result for no completions at all."""
        none = torch.zeros(0, device=self._device)
        lengths = torch.zeros(1, dtype=torch.int64, device=self._device)
        params = dataclasses.replace(self.loss_params, beta=0.0)
        return grpo_loss(none, none, none, lengths, params), sampling_mismatch(none, none, none.bool())

    @contextmanager
    def _fast_layers(self) -> Iterator[None]:
        models = [unwrap(model) for model in (self.model, self.reference_model) if model is not None]
        with shared_prefix_layers(*models), patches_by_matmul(*map(vision_tower, models)):
            yield

    # What DDP and DeepSpeed want around a micro-batch

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _is_deepspeed(self) -> bool:
        return hasattr(self.model, "set_gradient_accumulation_boundary")

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last one alone."""
        if self._is_deepspeed:
            self.model.set_gradient_accumulation_boundary(is_last)
        elif self.accelerator is not None and not is_last:
            context: AbstractContextManager[Any] = self.accelerator.no_sync(self.model)
            return context
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:  # text alone on a model of which only the vision tower trains
            return
        if self.accelerator is None:
            loss.backward()
        elif self._is_deepspeed:
            # accelerate's own backward would step the engine after every micro-batch.
            self.model.backward(loss * self._ranks, scale_wrt_gas=False)
        else:
            # Ranks average their gradients; the weights already divide by the whole batch, so undo that mean.
            self.accelerator.backward(loss * self._ranks)
