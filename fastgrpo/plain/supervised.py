"""Supervised fine-tuning's update in plain transformers: an example at a time, full-vocabulary logits."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from fastgrpo_kernels import logprob_from_logits
from torch import Tensor
from transformers import PreTrainedModel

from fastgrpo.model.families import is_multimodal, mrope_sections, unwrap
from fastgrpo.plain.engine import vision_inputs
from fastgrpo.types import Example
from fastgrpo.update.accumulation import GradientAccumulation
from fastgrpo.update.packed_forward import dummy_image_prompt
from fastgrpo.update.packing import ONE_TOKEN


class PlainSupervisedUpdater:
    """The same as `fastgrpo.update.supervised.SupervisedUpdater`, for every model that transformers runs."""

    def __init__(self, model: PreTrainedModel, *, accelerator: Accelerator | None = None) -> None:
        self.model: Any = model
        self.accumulation = GradientAccumulation(accelerator)
        with_dummy = self.accumulation.ranks > 1 and is_multimodal(model)
        nothing = torch.zeros(0, dtype=torch.int64)
        self._idle = Example(dummy_image_prompt(model) if with_dummy else ONE_TOKEN, nothing, nothing)

    def accumulate(self, examples: Sequence[Example], total_targets: int) -> Tensor:
        """See `SupervisedUpdater.accumulate`."""
        sums, every = torch.zeros(2, device=self._device), self._even(examples)
        for i, example in enumerate(every):
            with self.accumulation.micro_batch(self.model, is_last=i == len(every) - 1):
                losses = self._losses(self.model, example) / max(total_targets, 1)
                self.accumulation.backward(self.model, losses[0])
            sums += losses.detach()
        if every:
            self.accumulation.step(self.model)
        return sums

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> Tensor:
        """See `SupervisedUpdater.loss`."""
        model, sums = unwrap(self.model), torch.zeros(2, device=self._device)
        return sum((self._losses(model, example) for example in self._even(examples)), start=sums)

    def _even(self, examples: Sequence[Example]) -> list[Example]:
        return [*examples, *[self._idle] * (self.accumulation.most(len(examples), self._device) - len(examples))]

    def _losses(self, model: Any, example: Example) -> Tensor:
        """[2]: sums of cross-entropy, with gradient, and of entropy, without."""
        prompt, device = example.prompt, self._device
        input_ids, positions = prompt.input_ids[None].to(device), prompt.position_ids[:, None].to(device)
        logits = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=positions if mrope_sections(model) else positions[0],
            **vision_inputs(model, [prompt], input_ids),
            use_cache=False,
        ).logits[0, example.rows.to(device)]
        output = logprob_from_logits(logits, example.targets.to(device), entropy=True)
        assert output.entropy is not None
        return torch.stack([-output.logprobs.sum(), output.entropy.detach().sum()])

    @property
    def _device(self) -> torch.device:
        parameter: Tensor = next(self.model.parameters())
        return parameter.device
