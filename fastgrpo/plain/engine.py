"""Rollouts in plain torch and transformers: HF `generate`."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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

from fastgrpo.model.families import end_ids, family_of, learns_prompt, mrope_sections, placeholder_ids, unwrap
from fastgrpo.plain.hf_generation import LogprobRecorder, RepetitionPenalty, own_defaults_off
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams


def rollout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one rank's batch of completions at one step, the same after any resume."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits


class PlainEngine:
    """`Engine` over HF `generate`: a left-padded batch that holds every prompt G times.

    HF draws a batch from one random stream, so a completion depends on its batch. The stream is seeded by (run seed,
    step, rank, first prompt), so that repeated and resumed runs are equal.
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
        """`max_batch`: most completions of a `generate` call; `autocast`: the context it runs in."""
        self.model = model
        self.tokenizer = tokenizer
        self.rank = rank
        self.max_batch = max_batch
        self.autocast = autocast
        self.eos_ids = end_ids(model, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self.suppressed = placeholder_ids(model)

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        """See `Engine.generate`; groups come in the order of `prompts`."""
        # peft's learnt prompts count the padding before a prompt in their positions.
        per_call = 1 if learns_prompt(self.model) else max(1, self.max_batch // num_generations)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        for start in range(0, len(prompts), per_call):
            chunk = prompts[start : start + per_call]
            # Never around a `yield`: the caller may draw random numbers between groups.
            with span("rollout/generate"), torch.random.fork_rng(devices=devices):
                torch.manual_seed(rollout_seed(params.seed, step, self.rank) + start)
                completions = self._generate([p for p in chunk for _ in range(num_generations)], params)
            for i, prompt in enumerate(chunk):
                group = completions[i * num_generations : (i + 1) * num_generations]
                yield Rollout(
                    prompt, tuple(Completion(prompt.row_id, index, *fields) for index, fields in enumerate(group))
                )

    def sync(self) -> None:
        """Does nothing: this engine samples from the policy itself."""

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
        logprobs, sampling_logprobs = full.finish(tokens), drawn.finish(tokens)
        if logprobs is None or sampling_logprobs is None:
            logprobs = sampling_logprobs = self._read(prompts, sequences, attention_mask, params)
        logprobs, sampling_logprobs = logprobs.cpu(), sampling_logprobs.cpu()
        is_end = torch.isin(tokens, torch.tensor(self.eos_ids, device=device)).cpu()
        stopped = is_end.any(dim=1).tolist()
        ends = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, tokens.shape[1]).tolist()
        ids = [row[:end] for row, end in zip(tokens.cpu(), ends, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            (ids[i], texts[i], "stop" if stopped[i] else "length", logprobs[i, :end], sampling_logprobs[i, :end])
            for i, end in enumerate(ends)
        ]

    def _read(self, prompts: list[Prompt], sequences: Tensor, prompt_mask: Tensor, params: SamplingParams) -> Tensor:
        """[B, C] float32: log-probs of drawn tokens by a forward pass, with the prompts' padding on the left."""
        width = prompt_mask.shape[1]
        mask = torch.nn.functional.pad(prompt_mask, (0, sequences.shape[1] - width), value=1)
        with self.autocast():
            logits = self.model(
                input_ids=sequences,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0) if mrope_sections(self.model) is None else None,
                **vision_inputs(self.model, prompts, sequences),
                use_cache=False,
            ).logits[:, width - 1 : -1]  # [B, C, V]
        scores = torch.log_softmax(logits.float() / (params.temperature or 1.0), dim=-1)
        return scores.gather(2, sequences[:, width:, None]).squeeze(2)

    def _generation_config(self, params: SamplingParams) -> GenerationConfig:
        # All filters are off here; `_processors` applies them, so that log-probs are recorded before and after.
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


def vision_inputs(model: Any, prompts: Sequence[Prompt], input_ids: Tensor) -> dict[str, Any]:
    """The image arguments of a forward pass over a batch [B, L]; none when no prompt has a picture."""
    pixel_values = [p.pixel_values for p in prompts if p.pixel_values is not None]
    grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
    if not grids:
        return {}
    config, device = unwrap(model).config, input_ids.device
    family = family_of(config)
    inputs = family.style.inputs(torch.cat(pixel_values).to(device), torch.cat(grids))
    of_pictures = (input_ids == config.image_token_id).int()
    if "image_grid_thw" in inputs:
        inputs |= {"image_grid_thw": inputs["image_grid_thw"].to(device), "mm_token_type_ids": of_pictures}
    return inputs | ({"token_type_ids": of_pictures} if family.whole_pictures else {})
