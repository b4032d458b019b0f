"""The policy's update on packed groups: shared prompts once, no padding, one process or many.

`PackedUpdater` computes the same gradients as `fastgrpo.plain.updater.PlainUpdater`, faster.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LogprobOutput, LossOutput, LossParams, grpo_loss
from fastgrpo_profiling import span
from torch import Tensor
from transformers import PreTrainedModel

from fastgrpo.model.families import is_multimodal, unwrap
from fastgrpo.model.fused_vision import fused_vision
from fastgrpo.model.half_weights import half_weights
from fastgrpo.model.patch_embed import patches_by_matmul
from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.types import SamplingMismatch, TrainingGroup, UpdateResult
from fastgrpo.update.accumulation import GradientAccumulation, frozen_reference, update_result
from fastgrpo.update.fused_text import fused_text
from fastgrpo.update.packed_forward import dummy_image_prompt, packed_logprobs, require_packed_support
from fastgrpo.update.packing import PackedBatch, idle_batch, pack
from fastgrpo.update.shared_prefix import shared_prefix_layers
from fastgrpo.update.sums import sampling_mismatch


class PackedUpdater:
    """`Updater` on a transformers model: micro-batches packed to `token_budget` input tokens.

    With beta 0, completions that cannot have a gradient (advantage 0) are left out, also of the update's metrics:
    entropy, clip ratios and the sampling mismatch are then means over the tokens trained on. Completions without a
    counted token are always left out; they are in no metric anyway.

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
    ) -> None:
        """
        Args:
            token_budget: input tokens of a micro-batch, prompts counted once.
            attn_backend: see `fastgrpo.model.attention`.
            logprob_bytes: scratch of the LM head, see `linear_logprob`; None: by free memory.
            vision_cache: caches the features of a frozen vision tower; the sampler may share it.

        Raises:
            ValueError: a model whose attention or head cannot be replaced; the message says why. Use `PlainUpdater`.
        """
        require_packed_support(unwrap(model))
        self.model = model
        """Called for the forward pass; the trainer puts the module wrapped in DDP or DeepSpeed here."""
        self.loss_params = loss_params
        self.token_budget = token_budget
        self.temperature = temperature
        self.reference_model = reference_model
        self.accumulation = GradientAccumulation(accelerator)
        self.attn_backend = attn_backend
        self.logprob_bytes = logprob_bytes
        self.vision_cache = vision_cache
        # Ranks wait for each other's gradients of the vision tower, pictures or not.
        self._dummy_image = dummy_image_prompt(model) if self.accumulation.ranks > 1 and is_multimodal(model) else None

    @torch.no_grad()
    def logprobs(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """See `Updater.logprobs`."""
        batches = self._micro_batches(groups, skip_beta=None)
        found: list[dict[int, Tensor]] = [{} for _ in groups]
        with self._fast_layers():
            for batch in batches:
                # Not through DDP, whose forward broadcasts buffers.
                flat = self._forward(unwrap(self.model), batch.to(self._device), entropy=False).logprobs
                for (group, index), piece in zip(batch.owners, batch.split(flat), strict=False):
                    found[group][index] = piece
        return [tuple(pieces[i] for i in range(len(pieces))) for pieces in found]

    def accumulate(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """See `Updater.accumulate`. With several processes, all of them must call it, with groups or without.

        Processes first agree on the number of micro-batches. No other value is read from the device here, except the
        grids, by transformers' vision tower.
        """
        batches = self._micro_batches(groups, skip_beta=self.loss_params.beta)
        # All batches at once: a copy from the host inside the loop would wait for the device.
        batches = [batch.to(self._device) for batch in batches]
        outputs = []
        with self._fast_layers():
            for i, batch in enumerate(batches):
                with self.accumulation.micro_batch(self.model, is_last=i == len(batches) - 1):
                    outputs.append(self._micro_step(batch))
        if batches:
            self.accumulation.step(self.model)
        return update_result(outputs, self._device)

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
            self.accumulation.backward(self.model, output.loss)
        return output, sampling_mismatch(logprobs, batch.sampling_logprobs, batch.mask)

    def _micro_batches(self, groups: Sequence[TrainingGroup], skip_beta: float | None) -> list[PackedBatch]:
        """The same number on every rank: a collective inside a micro-batch waits for all of them."""
        with span("update/pack"):
            batches = pack(groups, self.token_budget, skip_beta=skip_beta, dummy_image=self._dummy_image)
            missing = self.accumulation.most(len(batches), self._device) - len(batches)
            return batches + [idle_batch(self._dummy_image)] * missing

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
        with frozen_reference(self.model, self.reference_model) as model:
            own = batch.to(next(model.parameters()).device)  # it may stay on the host
            return self._forward(model, own, entropy=False).logprobs.to(self._device)

    @contextmanager
    def _fast_layers(self) -> Iterator[None]:
        models = [unwrap(model) for model in (self.model, self.reference_model) if model is not None]
        towers = [vision_tower(model) for model in models]
        with (
            shared_prefix_layers(*models),
            fused_text(*models),
            fused_vision(*towers, backend=self.attn_backend),
            patches_by_matmul(*towers),
            # Only without DDP or DeepSpeed: their gradient hooks would not see the copies' gradients.
            half_weights(*models, trained=self.model is unwrap(self.model) or not torch.is_grad_enabled()),
        ):
            yield

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
