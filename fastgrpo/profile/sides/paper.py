"""A step as the published code of arXiv 2503.05132 takes it, waste included: a baseline for `fastgrpo profile`.

Same results, other work: each completion is drawn alone, so the picture and the prompt are encoded once for every
completion; the update pads, repeats the pixels, keeps the logits of prompt and completion, takes their log-softmax row
by row, and asks the frozen model even when the objective does not need it. That code's other habits (serial rewards,
images processed inside the step) are also those of the plain path.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fastgrpo_profiling import span
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastgrpo.model.families import mrope_sections
from fastgrpo.plain.engine import PlainEngine, rollout_seed, vision_inputs
from fastgrpo.plain.updater import PlainUpdater, sequence_positions
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams


class OneByOneEngine(PlainEngine):
    """One HF `generate` call for each completion."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        """See `Engine.generate`."""
        first_seed = rollout_seed(params.seed, step, self.rank)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        for place, prompt in enumerate(prompts):
            group = []
            for index in range(num_generations):
                with span("rollout/generate"), torch.random.fork_rng(devices=devices):
                    torch.manual_seed(first_seed + place * num_generations + index)
                    (fields,) = self._generate([prompt], params)
                group.append(Completion(prompt.row_id, index, *fields))
            yield Rollout(prompt, tuple(group))


class FullLogitsUpdater(PlainUpdater):
    """The update with all of the published code's work: `reference_model` must be given, and always runs."""

    def _forward(self, model: Any, batch: list[tuple[Prompt, Completion]]) -> tuple[Tensor, Tensor]:
        """Log-probs [T] of the completion tokens; entropies are not computed, zeros [T] stand for them."""
        device = self._device
        ids = [torch.cat([prompt.input_ids, completion.token_ids]) for prompt, completion in batch]
        input_ids = pad_sequence(ids, batch_first=True).to(device)  # [B, L]
        lengths = torch.tensor([len(row) for row in ids], device=device)
        positions = [sequence_positions(prompt, len(completion.token_ids)).T for prompt, completion in batch]
        position_ids = pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(device)  # [3, B, L]
        logits = model(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long(),
            position_ids=position_ids if mrope_sections(model) else position_ids[0],
            **vision_inputs(model, [prompt for prompt, _ in batch], input_ids),
            use_cache=False,
        ).logits  # [B, L, V]
        rows = []
        for scores, row_ids, (prompt, completion) in zip(logits, input_ids, batch, strict=True):
            logprobs = torch.log_softmax(scores[:-1].float() / self.temperature, dim=-1)  # [L - 1, V]
            taken = logprobs.gather(1, row_ids[1:, None]).squeeze(1)  # [L - 1]
            start = len(prompt.input_ids) - 1
            rows.append(taken[start : start + len(completion.token_ids)])
        flat = torch.cat(rows)
        return flat, torch.zeros_like(flat)

    @torch.no_grad()
    def _reference_logprobs(self, batch: list[tuple[Prompt, Completion]]) -> Tensor | None:
        assert self.reference_model is not None, "the published code always has one"
        logprobs = self._forward(self.reference_model, batch)[0]
        return logprobs if self.loss_params.beta > 0 else None


def paper_parts(
    model: PreTrainedModel, plain_engine: PlainEngine, plain_updater: PlainUpdater, reference_model: Any
) -> tuple[OneByOneEngine, FullLogitsUpdater]:
    """The engine and the updater of the published code, set up as the plain ones are."""
    engine = OneByOneEngine(model, plain_engine.tokenizer, rank=plain_engine.rank, autocast=plain_engine.autocast)
    updater = FullLogitsUpdater(
        model,
        plain_updater.loss_params,
        micro_batch_size=plain_updater.micro_batch_size,
        temperature=plain_updater.temperature,
        reference_model=reference_model,
        accelerator=plain_updater.accumulation.accelerator,
    )
    return engine, updater
