"""One GRPO step in plain torch and transformers: HF `generate`, one padded batch, full-vocabulary logits.

This is the executable specification of the engine and the policy. It is written to be read and to be right; the fast
paths are tested and measured against it, and it serves every model that they do not know.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from fastgrpo_kernels import LossParams, grpo_loss, logprob_from_logits
from fastgrpo_profiling import span
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgrpo.accumulation import GradientAccumulation, frozen_reference, update_result
from fastgrpo.hf_generation import LogprobRecorder, RepetitionPenalty, own_defaults_off
from fastgrpo.metrics import sampling_mismatch
from fastgrpo.model.packed_forward import company_prompt, is_multimodal, unwrap
from fastgrpo.packing import ONE_TOKEN
from fastgrpo.types import Completion, Prompt, SamplingParams, UpdateResult, WeightedGroup

NO_COMPLETION = Completion(-1, 0, torch.zeros(0, dtype=torch.int64), "", "abort", torch.zeros(0), torch.zeros(0))


def rollout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one rank's batch of completions at one step, the same after any resume."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits


class ReferenceEngine:
    """`Engine` over HF `generate`: a left-padded batch that holds every prompt G times.

    HF draws a batch from one random stream, so a completion depends on the batch it is in: the stream is seeded by
    (run seed, step, rank, first prompt) instead of by completion, which keeps runs and resumed runs equal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int = 0,
        max_batch: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """`max_batch` bounds the completions of a `generate` call, `autocast` is the context it runs in."""
        self.model = model
        self.tokenizer = tokenizer
        self.rank = rank
        self.max_batch = max_batch
        self.autocast = autocast
        eos = model.generation_config.eos_token_id
        self.eos_ids = sorted({*([eos] if isinstance(eos, int) else eos or []), tokenizer.eos_token_id} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        names = ("image_token_id", "video_token_id")
        # A sampled image placeholder has no picture behind it and breaks the next forward pass.
        self.suppressed = [t for name in names if (t := getattr(model.config, name, None)) is not None]

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[tuple[Prompt, tuple[Completion, ...]]]:
        """See `Engine.generate`; groups come in the order of `prompts`."""
        per_call = max(1, self.max_batch // num_generations)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        for start in range(0, len(prompts), per_call):
            chunk = prompts[start : start + per_call]
            # Never around a `yield`: whoever takes the groups may draw random numbers of their own in between.
            with span("rollout/generate"), torch.random.fork_rng(devices=devices):
                torch.manual_seed(rollout_seed(params.seed, step, self.rank) + start)
                completions = self._generate([p for p in chunk for _ in range(num_generations)], params)
            for i, prompt in enumerate(chunk):
                group = completions[i * num_generations : (i + 1) * num_generations]
                yield prompt, tuple(Completion(prompt.row_id, index, *fields) for index, fields in enumerate(group))

    def sync(self) -> None:
        """Nothing to do: it draws from the policy itself."""

    @torch.no_grad()
    def _generate(self, prompts: list[Prompt], params: SamplingParams) -> list[tuple[Any, ...]]:
        """Per prompt: token_ids, text, finish_reason, logprobs, sampling_logprobs."""
        device = self.model.device
        input_ids = pad_sequence(
            [p.input_ids for p in prompts], batch_first=True, padding_value=self.pad_id, padding_side="left"
        ).to(device)
        width = input_ids.shape[1]
        lengths = torch.tensor([len(p.input_ids) for p in prompts], device=device)
        attention_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # [B, width]
        full, drawn = LogprobRecorder(params.temperature or 1.0), LogprobRecorder(1.0)
        was_training = self.model.training
        self.model.eval()
        try:
            with own_defaults_off(self.model), self.autocast():
                sequences = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    **vision_inputs(self.model, prompts, input_ids),
                    generation_config=self._generation_config(params),
                    logits_processor=self._processors(params, full, drawn, attention_mask),
                )
        finally:
            self.model.train(was_training)
        tokens = sequences[:, width:]  # [B, longest completion]
        logprobs, sampling_logprobs = full.finish(tokens).cpu(), drawn.finish(tokens).cpu()
        is_end = torch.isin(tokens, torch.tensor(self.eos_ids, device=device)).cpu()
        stopped = is_end.any(dim=1).tolist()
        ends = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, tokens.shape[1]).tolist()
        ids = [row[:end] for row, end in zip(tokens.cpu(), ends, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            (ids[i], texts[i], "stop" if stopped[i] else "length", logprobs[i, :end], sampling_logprobs[i, :end])
            for i, end in enumerate(ends)
        ]

    def _generation_config(self, params: SamplingParams) -> GenerationConfig:
        # Every filter is off here and stated in `_processors`, so that both log-probs can be read around them.
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            **(sampled if params.temperature > 0 else {"do_sample": False}),
            max_new_tokens=params.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            use_cache=True,
        )

    def _processors(
        self, params: SamplingParams, full: LogitsProcessor, drawn: LogitsProcessor, prompt_mask: Tensor
    ) -> LogitsProcessorList:
        chain: list[LogitsProcessor] = [full]
        if self.suppressed:
            chain.append(SuppressTokensLogitsProcessor(self.suppressed, device=str(self.model.device)))
        if params.repetition_penalty != 1.0:
            chain.append(RepetitionPenalty(params.repetition_penalty, prompt_mask))
        if params.temperature > 0:
            if params.temperature != 1.0:
                chain.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k > 0:
                chain.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                chain.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0.0:
                chain.append(MinPLogitsWarper(params.min_p))
        return LogitsProcessorList([*chain, drawn])


class ReferencePolicy:
    """`Policy` on the HF model: right-padded micro-batches of `micro_batch_size` completions.

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
    ) -> None:
        self.model = model
        """Called for the forward pass; the trainer puts the DDP- or autocast-wrapped module here."""
        self.loss_params = loss_params
        self.micro_batch_size = micro_batch_size
        self.temperature = temperature
        self.reference_model = reference_model
        self.accumulation = GradientAccumulation(accelerator)
        self.version = 0
        # Ranks wait for each other's gradients of the vision tower, pictures or not.
        self._company = company_prompt(model) if self.accumulation.ranks > 1 and is_multimodal(model) else None

    @torch.no_grad()
    def logprobs(self, groups: Sequence[WeightedGroup]) -> list[tuple[Tensor, ...]]:
        """See `Policy.logprobs`."""
        pieces: list[Tensor] = []
        for batch in self._micro_batches(groups):
            # Not through DDP, whose forward broadcasts buffers.
            flat = self._forward(unwrap(self.model), batch)[0]
            pieces += flat.split([len(c.token_ids) for _, c in batch])
        by_group = iter(pieces)
        return [tuple(next(by_group) for _ in group.completions) for group in groups]

    def accumulate(self, groups: Sequence[WeightedGroup]) -> UpdateResult:
        """See `Policy.accumulate`. With several processes, all of them must call it, with groups or without."""
        batches = self._micro_batches(groups)
        outputs, offset = [], 0
        for i, batch in enumerate(batches):
            fields = _loss_inputs(groups, slice(offset, offset + len(batch)), self._device)
            offset += len(batch)
            with self.accumulation.micro_batch(self.model, is_last=i == len(batches) - 1):
                with span("update/reference_model"):
                    ref_logprobs = self._reference_logprobs(batch)
                with span("update/forward"):
                    logprobs, entropy = self._forward(self.model, batch)
                    output = grpo_loss(
                        logprobs, params=self.loss_params, ref_logprobs=ref_logprobs, entropy=entropy.detach(), **fields
                    )
                with span("update/backward"):
                    self.accumulation.backward(self.model, output.loss)
            with span("update/metrics"):
                drawn = _joined([completion.sampling_logprobs for _, completion in batch]).to(self._device)
                outputs.append((output, sampling_mismatch(logprobs, drawn, fields["mask"])))
        if batches:
            self.accumulation.step(self.model)
        return update_result(outputs, self._device)

    def _micro_batches(self, groups: Sequence[WeightedGroup]) -> list[list[tuple[Prompt, Completion]]]:
        """The same number on every rank, empty ones behind: a collective inside a micro-batch waits for all of them."""
        flat = [(group.prompt, completion) for group in groups for completion in group.completions]
        batches = [flat[i : i + self.micro_batch_size] for i in range(0, len(flat), self.micro_batch_size)]
        return batches + [[]] * (self.accumulation.most(len(batches), self._device) - len(batches))

    def _forward(self, model: Any, batch: list[tuple[Prompt, Completion]]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T] of the batch's completion tokens, one completion after the other."""
        device = next(model.parameters()).device
        first = min((len(prompt.input_ids) for prompt, _ in batch), default=1) - 1  # no completion is read before it
        if not batch or (self._company is not None and all(prompt.pixel_values is None for prompt, _ in batch)):
            batch = [*batch, (self._company or ONE_TOKEN, NO_COMPLETION)]
        ids = [torch.cat([prompt.input_ids, completion.token_ids]) for prompt, completion in batch]
        input_ids = pad_sequence(ids, batch_first=True).to(device)  # [B, L], right-padded
        lengths = torch.tensor([len(row) for row in ids], device=device)
        attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        positions = [sequence_positions(prompt, len(completion.token_ids)) for prompt, completion in batch]
        position_ids = torch.nn.utils.rnn.pad_sequence([p.T for p in positions], batch_first=True)  # [B, L, 3]
        position_ids = position_ids.permute(2, 0, 1).to(device)  # [3, B, L]
        kept = input_ids.shape[1] - first
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids if is_multimodal(model) else position_ids[0],
            **vision_inputs(model, [prompt for prompt, _ in batch], input_ids),
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


def _loss_inputs(groups: Sequence[WeightedGroup], chosen: slice, device: torch.device) -> dict[str, Any]:
    """The arguments of `grpo_loss` for a slice of the flattened groups' completions."""
    weights = [w for group in groups for w in group.token_weights][chosen]
    masks = [m for group in groups for m in group.masks][chosen]
    advantages = _joined([group.advantages for group in groups])[chosen]
    old = [o for group in groups for o in group.old_logprobs or ()][chosen]
    lengths = torch.tensor([0, *map(len, weights)])
    return {
        "advantages": advantages.to(device),
        "weights": _joined(weights).to(device),
        "mask": _joined(masks).bool().to(device),
        "cu_seqlens": lengths.cumsum(0).to(device),
        "old_logprobs": torch.cat(old).to(device) if old else None,
    }


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces or [torch.zeros(0)])


def sequence_positions(prompt: Prompt, completion_length: int) -> Tensor:
    """[3, P + C] int64 M-RoPE positions: a completion restarts at max(prompt) + 1 on all three axes."""
    start = int(prompt.position_ids.max()) + 1
    completion = torch.arange(start, start + completion_length).expand(3, -1)
    return torch.cat([prompt.position_ids, completion], dim=1)


def vision_inputs(model: Any, prompts: Sequence[Prompt], input_ids: Tensor) -> dict[str, Tensor]:
    """The image arguments of a forward pass over a batch [B, L]; none when no prompt has a picture."""
    pixel_values = [p.pixel_values for p in prompts if p.pixel_values is not None]
    grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
    if not grids:
        return {}
    return {
        "pixel_values": torch.cat(pixel_values).to(input_ids.device),
        "image_grid_thw": torch.cat(grids).to(input_ids.device),
        "mm_token_type_ids": (input_ids == unwrap(model).config.image_token_id).int(),
    }
