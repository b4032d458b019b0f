"""The update in plain torch and transformers: one padded batch, full-vocabulary logits."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LossParams, logprob_from_logits
from fastgrpo_profiling import span
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastgrpo.model.families import is_multimodal, mrope_sections, unwrap
from fastgrpo.model.float32_head import head_in_float32
from fastgrpo.model.router_loss import caught_router_losses
from fastgrpo.plain.engine import vision_inputs
from fastgrpo.types import Completion, Prompt, Rollout, TrainingGroup, UpdateResult
from fastgrpo.update.accumulation import GradientAccumulation, frozen_reference
from fastgrpo.update.micro_loss import MicroBatchResult, Scaling, micro_loss, update_result, with_router_loss
from fastgrpo.update.packed_forward import dummy_image_prompt
from fastgrpo.update.packing import ONE_TOKEN

NO_COMPLETION = Completion(-1, 0, torch.zeros(0, dtype=torch.int64), "", "abort", torch.zeros(0), torch.zeros(0))


class PlainUpdater:
    """`Updater` on the HF model: right-padded micro-batches of `micro_batch_size` completions.

    The frozen reference of the KL term is `reference_model`, or the model itself with its adapters off (peft).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss_params: LossParams,
        *,
        micro_batch_size: int,
        temperature: float = 1.0,
        reference_model: PreTrainedModel | None = None,
        accelerator: Accelerator | None = None,
        scaling: Scaling | None = None,
        float32_head: bool = False,
        router_coefficient: float = 0.0,
    ) -> None:
        self.model = model
        """Called for the forward pass; the trainer puts the DDP- or autocast-wrapped module here."""
        self.loss_params = loss_params
        self.micro_batch_size = micro_batch_size
        self.temperature = temperature
        self.reference_model = reference_model
        self.scaling = scaling or Scaling()
        self.router_coefficient = router_coefficient
        self.float32_head = float32_head
        self.accumulation = GradientAccumulation(accelerator)
        # Ranks wait for each other's vision gradients, even in batches without pictures.
        self._dummy_image = dummy_image_prompt(model) if self.accumulation.ranks > 1 and is_multimodal(model) else None

    def logprobs(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """See `Updater.logprobs`."""
        return self._without_gradient(groups, 0)

    def entropies(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """See `Updater.entropies`."""
        return self._without_gradient(groups, 1)

    @torch.no_grad()
    def _without_gradient(self, groups: Sequence[TrainingGroup], which: int) -> list[tuple[Tensor, ...]]:
        """Per group, G tensors [C] float32: of the forward pass's results, that one."""
        pieces: list[Tensor] = []
        for batch in self._micro_batches(groups):
            # Not through DDP, whose forward broadcasts buffers.
            flat = self._forward(unwrap(self.model), batch)[which]
            pieces += flat.split([len(c.token_ids) for _, c in batch])
        by_group = iter(pieces)
        return [tuple(next(by_group) for _ in group.completions) for group in groups]

    def with_reference(self, rollouts: Sequence[Rollout], masks: Sequence[Tensor]) -> list[Rollout]:
        """See `Updater.with_reference`. As the published code does, each micro-batch asks for its own."""
        return list(rollouts)

    def accumulate(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """See `Updater.accumulate`. With several processes, all of them must call it, with groups or without."""
        batches = self._micro_batches(groups)
        outputs = []
        for i, batch in enumerate(batches):
            with self.accumulation.micro_batch(self.model, is_last=i == len(batches) - 1):
                outputs.append(self._losses(self.model, groups, batch, i))
                with span("update/backward"):
                    self.accumulation.backward(self.model, outputs[-1].loss)
        if batches:
            self.accumulation.step(self.model)
        return update_result(outputs, self._device)

    @torch.no_grad()
    def measure(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """See `Updater.measure`."""
        batches = self._micro_batches(groups)
        outputs = [self._losses(unwrap(self.model), groups, batch, i) for i, batch in enumerate(batches)]
        return update_result(outputs, self._device)

    def _losses(
        self, model: Any, groups: Sequence[TrainingGroup], batch: list[tuple[Prompt, Completion]], number: int
    ) -> MicroBatchResult:
        """Of a micro-batch, by its number."""
        first = number * self.micro_batch_size
        fields = _loss_inputs(groups, slice(first, first + len(batch)), self._device)
        with span("update/reference_model"):
            ref_logprobs = self._reference_logprobs(batch)
        with span("update/forward"):
            with caught_router_losses(model, bool(self.router_coefficient and batch)) as caught:
                logprobs, entropy = self._forward(model, batch)
            result = micro_loss(logprobs, entropy, fields, self.loss_params, self.scaling, ref_logprobs)
            share = len(batch) / max(1, sum(len(group.completions) for group in groups)) / self.accumulation.ranks
            return with_router_loss(result, caught, self.router_coefficient, share)

    def _micro_batches(self, groups: Sequence[TrainingGroup]) -> list[list[tuple[Prompt, Completion]]]:
        """The same number on every rank, padded with empty ones: collectives in a micro-batch wait for all ranks."""
        flat = [(group.prompt, completion) for group in groups for completion in group.completions]
        batches = [flat[i : i + self.micro_batch_size] for i in range(0, len(flat), self.micro_batch_size)]
        return batches + [[]] * (self.accumulation.most(len(batches), self._device) - len(batches))

    def _forward(self, model: Any, batch: list[tuple[Prompt, Completion]]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T] of the batch's completion tokens, one completion after the other."""
        device = next(model.parameters()).device
        first = min((len(prompt.input_ids) for prompt, _ in batch), default=1) - 1  # no completion is read before it
        seen = [completion.whole or prompt for prompt, completion in batch]
        if not batch or (self._dummy_image is not None and all(one.pixel_values is None for one in seen)):
            batch = [*batch, (self._dummy_image or ONE_TOKEN, NO_COMPLETION)]
            seen.append(batch[-1][0])
        ids = [torch.cat([prompt.input_ids, completion.token_ids]) for prompt, completion in batch]
        input_ids = pad_sequence(ids, batch_first=True).to(device)  # [B, L], right-padded
        lengths = torch.tensor([len(row) for row in ids], device=device)
        attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        positions = [sequence_positions(one, len(row) - len(one.input_ids)) for one, row in zip(seen, ids, strict=True)]
        position_ids = torch.nn.utils.rnn.pad_sequence([p.T for p in positions], batch_first=True)  # [B, L, 3]
        position_ids = position_ids.permute(2, 0, 1).to(device)  # [3, B, L]
        kept = input_ids.shape[1] - first
        with head_in_float32(unwrap(model)) if self.float32_head else nullcontext():
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids if mrope_sections(model) else position_ids[0],
                **vision_inputs(model, seen, input_ids),
                use_cache=False,
                logits_to_keep=kept,
            ).logits  # [B, kept, V]
        # The logits at position i predict token i + 1: a completion is read from its prompt's last position on.
        rows = torch.cat(
            [
                torch.arange(len(prompt.input_ids), len(row)) - 1 - first + b * kept
                for b, (row, (prompt, _)) in enumerate(zip(ids, batch, strict=True))
            ]
        ).to(device)
        targets = torch.cat([completion.token_ids for _, completion in batch]).to(device)
        output = logprob_from_logits(logits.flatten(0, 1)[rows], targets, temperature=self.temperature, entropy=True)
        assert output.entropy is not None
        return output.logprobs, output.entropy

    @torch.no_grad()
    def _reference_logprobs(self, batch: list[tuple[Prompt, Completion]]) -> Tensor | None:
        if self.loss_params.beta == 0.0:
            return None
        with frozen_reference(self.model, self.reference_model) as model:
            return self._forward(model, batch)[0].to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class PaddedInputs:
    """`LossInputs` of a slice of the groups' flattened completions."""

    advantages: Tensor
    weights: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    sampling_logprobs: Tensor
    old_logprobs: Tensor | None
    policy_scale: Tensor | None
    entropy_weights: Tensor | None


def _loss_inputs(groups: Sequence[TrainingGroup], chosen: slice, device: torch.device) -> PaddedInputs:
    def flat(name: str) -> list[Tensor]:
        return [piece for group in groups for piece in getattr(group, name) or ()][chosen]

    def optional(name: str) -> Tensor | None:
        pieces = flat(name)
        return torch.cat(pieces).to(device) if pieces else None

    completions = [completion for group in groups for completion in group.completions][chosen]
    lengths = torch.tensor([0, *(len(completion.token_ids) for completion in completions)])
    return PaddedInputs(
        advantages=_joined([group.advantages for group in groups])[chosen].to(device),
        weights=_joined(flat("token_weights")).to(device),
        mask=_joined(flat("masks")).bool().to(device),
        cu_seqlens=lengths.cumsum(0).to(device),
        sampling_logprobs=_joined([completion.sampling_logprobs for completion in completions]).to(device),
        old_logprobs=optional("old_logprobs"),
        policy_scale=optional("policy_scale"),
        entropy_weights=optional("entropy_weights"),
    )


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces or [torch.zeros(0)])


def sequence_positions(prompt: Prompt, completion_length: int) -> Tensor:
    """[3, P + C] int64 M-RoPE positions: a completion restarts at max(prompt) + 1 on all three axes."""
    start = int(prompt.position_ids.max()) + 1
    completion = torch.arange(start, start + completion_length).expand(3, -1)
    return torch.cat([prompt.position_ids, completion], dim=1)
