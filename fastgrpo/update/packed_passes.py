"""Forward and backward passes of a policy over packed micro-batches, on one process or many, whatever the loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LogprobOutput
from transformers import PreTrainedModel

from fastgrpo.model.families import is_multimodal, unwrap
from fastgrpo.model.fused_text import fused_text
from fastgrpo.model.fused_vision import fused_vision
from fastgrpo.model.half_weights import half_weights
from fastgrpo.model.patch_embed import patches_by_matmul
from fastgrpo.model.vision import vision_tower
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.update.accumulation import GradientAccumulation
from fastgrpo.update.packed_forward import dummy_image_prompt, packed_logprobs, require_packed_support
from fastgrpo.update.packing import PackedBatch, idle_batch
from fastgrpo.update.shared_prefix import attend_rotated, shared_prefix_layers
from fastgrpo.update.shared_state import shared_state_layers

Output = TypeVar("Output")


class PackedPasses:
    """A transformers model and how packed micro-batches go through it."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        token_budget: int,
        temperature: float = 1.0,
        accelerator: Accelerator | None = None,
        attn_backend: str = "auto",
        logprob_bytes: int | None = None,
        vision_cache: VisionCache | None = None,
        float32_head: bool = False,
    ) -> None:
        """
        Args:
            token_budget: input tokens of a micro-batch, prompts counted once.
            attn_backend: see `fastgrpo.model.attention`.
            logprob_bytes: scratch of the LM head, see `linear_logprob`; None: by free memory.
            vision_cache: caches the features of a frozen vision tower; the sampler may share it.
            float32_head: the LM head's product in float32, whatever the layers before it compute in.

        Raises:
            ValueError: a model whose attention or head cannot be replaced; the message says why.
        """
        require_packed_support(unwrap(model))
        self.model = model
        """Called for the forward pass; the trainer puts the module wrapped in DDP or DeepSpeed here."""
        self.token_budget = token_budget
        self.temperature = temperature
        self.accumulation = GradientAccumulation(accelerator)
        self.attn_backend = attn_backend
        self.logprob_bytes = logprob_bytes
        self.vision_cache = vision_cache
        self.float32_head = float32_head
        # Ranks wait for each other's gradients of the vision tower, pictures or not.
        self.dummy_image = dummy_image_prompt(model) if self.accumulation.ranks > 1 and is_multimodal(model) else None

    def even(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """The same number on every rank: a collective inside a micro-batch waits for all of them."""
        missing = self.accumulation.most(len(batches), self.device) - len(batches)
        return batches + [idle_batch(self.dummy_image)] * missing

    def each(self, batches: Sequence[PackedBatch], micro_step: Callable[[PackedBatch], Output]) -> list[Output]:
        """What `micro_step` gives for each of the batches of an optimizer step, within `fast_layers`.

        No value is read from the device here, except the grids, by transformers' vision tower.
        """
        # All batches at once: a copy from the host inside the loop would wait for the device.
        batches = [batch.to(self.device) for batch in batches]
        outputs = []
        for i, batch in enumerate(batches):
            with self.accumulation.micro_batch(self.model, is_last=i == len(batches) - 1):
                outputs.append(micro_step(batch))
        if batches:
            self.accumulation.step(self.model)
        return outputs

    def forward(self, model: Any, batch: PackedBatch, *, entropy: bool) -> LogprobOutput:
        """Log-probs and entropies of a batch's targets, see `packed_logprobs`."""
        return packed_logprobs(
            model,
            batch,
            temperature=self.temperature,
            entropy=entropy,
            attn_backend=self.attn_backend,
            logprob_bytes=self.logprob_bytes,
            vision_cache=self.vision_cache,
            float32_head=self.float32_head,
        )

    @contextmanager
    def fast_layers(self, *others: Any) -> Iterator[None]:
        """Within this context the model's layers, and those of `others` that are not None, are the fused ones."""
        models = [unwrap(model) for model in (self.model, *others) if model is not None]
        towers = [vision_tower(model) for model in models]
        with (
            shared_prefix_layers(*models),
            shared_state_layers(*models),
            fused_text(*models, attend=attend_rotated),
            fused_vision(*towers, backend=self.attn_backend),
            patches_by_matmul(*towers),
            # Only without DDP or DeepSpeed: their gradient hooks would not see the copies' gradients.
            half_weights(*models, trained=self.model is unwrap(self.model) or not torch.is_grad_enabled()),
        ):
            yield

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
