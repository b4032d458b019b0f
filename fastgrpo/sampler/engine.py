"""`SamplerEngine`: samples completions over a paged cache, many times faster than HF `generate`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fastgrpo_kernels import SampleParams
from fastgrpo_profiling import span
from torch import Tensor

from fastgrpo.model.families import base_model, end_ids, placeholder_ids
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.sampler.block_manager import BlockManager
from fastgrpo.sampler.choice import build_parts
from fastgrpo.sampler.decoder import KVCache
from fastgrpo.sampler.guesser import Guesser
from fastgrpo.sampler.runner import Ended, Limits, Runner
from fastgrpo.sampler.scheduler import Scheduler
from fastgrpo.sampler.sequence import PromptGroup
from fastgrpo.sampler.speculation import Acceptance, Speculation, SpeculativeRunner
from fastgrpo.types import Completion, FinishReason, Prompt, Rollout, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplerOptions:
    """How the sampler uses the machine. Affects what is drawn only through floating-point order."""

    max_rows: int = 256
    """Most completions that run at a time."""
    max_cache_tokens: int | None = None
    """Size of the KV cache; None: what `max_rows` completions of a call may need, on a GPU within its free memory."""
    page_size: int = 16
    """Tokens of a cache page: a power of two."""
    prefill_tokens: int = 8192
    """Most tokens of a prefill pass; longer prompts are split over several passes."""
    steps_per_check: int | None = None
    """Decode steps between checks for finished rows; None: 16 on a GPU, 1 elsewhere, where a check costs nothing."""
    cuda_graphs: bool = True
    """Replay captured decode steps on a GPU."""
    speculate: int = 0
    """Most tokens guessed for a row in a decode step; 0: none. What is drawn does not depend on it."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_cache_tokens", "page_size", "prefill_tokens", "steps_per_check"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not valid: use 1 or more.")
        if self.speculate < 0:
            raise ValueError(f"speculate={self.speculate} is not valid: use 0 or more.")
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size={self.page_size} is not valid: use a power of two.")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free, with those that torch holds in reserve; None on other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class SamplerEngine:
    """`Engine` with a paged KV cache, and prompts shared by their group."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        options: SamplerOptions | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        vision_cache: VisionCache | None = None,
        memory_to_come: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            model: the policy, a transformers or peft model; its vision tower is used as it is, without copying it.
            tokenizer: for the end token and the completions' texts.
            options: how to use the machine.
            dtype: of weights and cache; None: the model's.
            device: of weights and cache; None: the model's.
            autocast: the context that the vision tower runs in.
            vision_cache: caches a frozen vision tower's features; the policy may share it.
            memory_to_come: bytes of device memory needed after the rollout; the KV cache leaves them free.

        Raises:
            ValueError: a model that the sampler cannot run.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.options = options or SamplerOptions()
        self.memory_to_come = memory_to_come
        policy = base_model(model)
        self.eos_ids = end_ids(policy, tokenizer)
        self.suppressed = placeholder_ids(policy)
        try:
            self.decoder, self.prefill, self._sync = build_parts(
                model,
                dtype or policy.dtype,
                device or policy.device,
                self.options.prefill_tokens,
                autocast,
                vision_cache,
            )
        except ValueError as error:
            raise ValueError(f"the sampler cannot run this model, {error}: use PlainEngine.") from error
        self.speculation = self._speculation()
        self.runner: Runner | None = None
        self.served: Limits | None = None
        """The sizes requested of the runner, before its cache was cut to fit memory."""
        self._is_synced = False
        self._is_busy = False
        self._aborted: set[int] = set()

    def sync(self) -> None:
        """Copies the policy's weights. Under ZeRO-3 all ranks must call it together."""
        with span("rollout/sync"):
            self._sync(self.model)
        self._is_synced = True

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        """See `Engine.generate`; a group is yielded as soon as its last completion has ended.

        Raises:
            ValueError: a prompt with its completion does not fit the cache.
            RuntimeError: `sync` was never called, or another call's iterator has neither ended nor been closed.
        """
        if self._is_busy:
            raise RuntimeError("generate: another call has not ended; exhaust its iterator or close() it first.")
        if not self._is_synced:
            raise RuntimeError("generate: the sampler has no weights yet; call sync() first, on all ranks together.")
        if not prompts:
            return
        groups = [PromptGroup.of(p, num_generations, seed=params.seed, step=step) for p in prompts]
        runner = self._runner_for(groups, params)
        assert self.served is not None
        scheduler = Scheduler(
            BlockManager(runner.limits.pages, self.options.page_size),
            max_rows=runner.limits.rows,
            max_groups=runner.limits.groups,
            max_new_tokens=params.max_new_tokens,
            short_of_memory=runner.limits.pages < self.served.pages,
        )
        try:
            for group in groups:
                scheduler.add(group)
        except ValueError:
            self.runner = None  # the next call checks again how much memory is free
            raise
        if self.speculation is not None:
            self.speculation.acceptance.begin()
        self._is_busy = True
        try:
            while scheduler.has_work:
                complete: list[Rollout] = []
                with self.decoder.running():  # left while the caller has a group: the model is the policy's own
                    while scheduler.has_work and not complete:
                        self._admit(scheduler, runner)
                        self._decode(scheduler, runner)
                        complete = self._finish(scheduler, runner)
                yield from complete
        finally:
            runner.arrange([])
            self._is_busy = False
            self._aborted.clear()

    def abort(self, row_id: int) -> None:
        """Ends a prompt's completions at the next check for finished rows; call it between two groups.

        They are returned with the tokens drawn so far (none if they had not started) and finish reason "abort". Does
        nothing outside of a `generate` call.
        """
        if self._is_busy:
            self._aborted.add(row_id)

    def _admit(self, scheduler: Scheduler, runner: Runner) -> None:
        """Admits sequences that fit; otherwise drops finished rows once a smaller step pays for the move."""
        admitted = scheduler.admit()
        if admitted:
            new = [g for g in dict.fromkeys(s.group for s in admitted) if g.first_logits is None]
            with span("rollout/prefill"):
                self.prefill.run(new, runner.cache, runner.page_size)
        if admitted or runner.is_sparse(len(scheduler.running)):
            with span("rollout/arrange"):
                runner.arrange(scheduler.running)

    def _decode(self, scheduler: Scheduler, runner: Runner) -> None:
        default = 16 if self.decoder.device.type == "cuda" else 1
        with span("rollout/decode"):
            runner.run(min(self.options.steps_per_check or default, runner.limits.max_new_tokens))

    def _finish(self, scheduler: Scheduler, runner: Runner) -> list[Rollout]:
        """Removes sequences that have ended; returns the groups that are complete."""
        with span("rollout/check"):
            ended = [*self._take_aborted(scheduler, runner), *runner.ended()]
            texts = self.tokenizer.batch_decode([e.tokens for e in ended], skip_special_tokens=True) if ended else []
        complete: list[PromptGroup] = []
        for (sequence, tokens, logprobs, sampling_logprobs), text in zip(ended, texts, strict=True):
            scheduler.finish(sequence)
            group = sequence.group
            group.completions[sequence.index] = Completion(
                group.prompt.row_id,
                sequence.index,
                tokens,
                text,
                self._finish_reason(tokens, runner.limits.max_new_tokens),
                logprobs,
                sampling_logprobs,
            )
            if group.unfinished == 0:
                group.first_logits, group.states = None, ()
                complete.append(group)
        return [
            Rollout(group.prompt, tuple(group.completions[i] for i in range(len(group.sequences))))
            for group in complete
        ]

    def _take_aborted(self, scheduler: Scheduler, runner: Runner) -> list[Ended]:
        """Stops the rows of aborted prompts; returns their sequences that have no row yet."""
        aborted = [s for s in (*scheduler.running, *scheduler.waiting) if s.group.prompt.row_id in self._aborted]
        runner.stop([s.row for s in aborted if s.row is not None])
        none = torch.zeros(0)
        return [Ended(s, none.long(), none, none) for s in aborted if s.row is None]

    def _finish_reason(self, tokens: Tensor, max_new_tokens: int) -> FinishReason:
        if len(tokens) and int(tokens[-1]) in self.eos_ids:
            return "stop"
        return "length" if len(tokens) == max_new_tokens else "abort"

    def _runner_for(self, groups: list[PromptGroup], params: SamplingParams) -> Runner:
        """The last call's runner if its settings match and its buffers are large enough, else a new one."""
        sampling = SampleParams(params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty)
        needed = self._limits(groups, params.max_new_tokens)
        serves = self.served is not None and self.served.cover(needed)
        if self.runner is not None and self.runner.params == sampling and serves:
            return self.runner
        self.runner = None  # free its memory before allocating the next one's
        self.served = needed
        kind = Runner if self.speculation is None else partial(SpeculativeRunner, speculation=self.speculation)
        self.runner = kind(
            self.decoder,
            self._within_memory(needed),
            self.options.page_size,
            sampling,
            eos_ids=self.eos_ids,
            suppressed=self.suppressed,
            cuda_graphs=self.options.cuda_graphs and self.decoder.device.type == "cuda",
        )
        return self.runner

    @property
    def accepted_per_step(self) -> float | None:
        """Tokens that a row gained in a decode step, mean over the last `generate`; None where nothing is guessed."""
        counts = self.speculation and self.speculation.acceptance
        return counts.tokens / counts.row_steps if counts and counts.row_steps else None

    def _speculation(self) -> Speculation | None:
        """What is kept from rollout to rollout; None where nothing is guessed."""
        if not self.options.speculate:
            return None
        if self.decoder.shape.state_sizes:
            logger.warning("speculate: tokens are not guessed, since layers of linear attention cannot take one back.")
            return None
        return Speculation(Guesser(self.decoder.device), Acceptance(self.options.speculate))

    def _limits(self, groups: list[PromptGroup], max_new_tokens: int) -> Limits:
        size = self.options.page_size
        rows = min(self.options.max_rows, sum(len(group.sequences) for group in groups))
        # Rounded up to a power of two, so that slightly longer prompts of the next call fit as well.
        prefix_pages = 1 << (-(-max(group.length for group in groups) // size) - 1).bit_length()
        suffix_pages = -(-(max_new_tokens - 1) // size)
        together = min(rows, len(groups))
        pages = rows * suffix_pages + together * prefix_pages
        if self.options.max_cache_tokens is not None:
            pages = min(pages, self.options.max_cache_tokens // size)
        return Limits(rows, together, prefix_pages, suffix_pages, max_new_tokens, pages)

    def _within_memory(self, limits: Limits) -> Limits:
        """On a GPU, limits the cache to 0.8 of the memory that is free and is not needed after the rollout."""
        free = free_memory(self.decoder.device)
        if free is None:
            return limits
        coming = self.memory_to_come()
        if self.prefill.vision_cache is not None:
            coming += self.prefill.vision_cache.room
        coming += limits.rows * KVCache.state_bytes(self.decoder.shape)
        page = KVCache.page_bytes(self.decoder.shape, self.options.page_size, self.decoder.dtype)
        return replace(limits, pages=min(limits.pages, int(0.8 * max(0, free - coming)) // page))
