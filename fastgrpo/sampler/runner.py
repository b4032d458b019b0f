"""Decodes over static buffers: one step draws one token for every row.

The step works on preallocated tensors and reads no value on the host, so on CUDA it is captured in a graph and replayed
many times between two checks by the host. Elsewhere the same function runs eagerly.
"""

from collections import Counter
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from fastgrpo_kernels import PagedLayout, SampleParams, sample
from fastgrpo_profiling import span
from torch import Tensor

from fastgrpo.sampler.cuda_graph import StepGraphs
from fastgrpo.sampler.decoder import Decoder, KVCache
from fastgrpo.sampler.sequence import PromptGroup, Sequence


@dataclass(frozen=True)
class Limits:
    """Sizes of the buffers."""

    rows: int
    """R: most sequences that run at a time."""
    groups: int
    """P: prompts they belong to."""
    prefix_pages: int
    """M: pages of the longest prompt."""
    suffix_pages: int
    """S: pages of the longest completion."""
    max_new_tokens: int
    """C"""
    pages: int
    """Pages of the whole cache."""

    def cover(self, other: "Limits") -> bool:
        """Whether buffers of these sizes are large enough for `other`."""
        exact = self.max_new_tokens == other.max_new_tokens
        return exact and all(getattr(self, f.name) >= getattr(other, f.name) for f in fields(self))


@dataclass(frozen=True)
class RowState:
    """The decode step's state per row. Rows without a sequence count as finished."""

    tokens: Tensor
    """[R] int64: the last token drawn."""
    counters: Tensor
    """[R] int64: tokens drawn so far; the last one of them is not in the cache yet."""
    finished: Tensor
    """[R] bool"""
    starts: Tensor
    """[R] int64: rotary position of the first token drawn."""
    seeds: Tensor
    """[R] int64"""
    suffix_tables: Tensor
    """[R, S] int32"""
    prefix_ids: Tensor
    """[R] int32, −1 in rows without a sequence."""
    drawn: Tensor
    """[R, C + 1] int64: the tokens drawn. The last column takes what finished rows draw."""
    logprobs: Tensor
    """[R, C + 1] float32"""
    sampling_logprobs: Tensor
    """[R, C + 1] float32"""
    seen: Tensor | None
    """[R, V] bool: tokens that the repetition penalty applies to; None without one."""

    @classmethod
    def empty(cls, limits: Limits, seen: int, device: torch.device) -> "RowState":
        """Rows without sequences; `seen` is the vocabulary's size, or 0 without a repetition penalty."""
        rows, columns = limits.rows, limits.max_new_tokens + 1

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            tokens=zeros(rows),
            counters=zeros(rows),
            finished=zeros(rows, dtype=torch.bool).fill_(True),
            starts=zeros(rows),
            seeds=zeros(rows),
            suffix_tables=zeros(rows, max(1, limits.suffix_pages), dtype=torch.int32),
            prefix_ids=zeros(rows, dtype=torch.int32).fill_(-1),
            drawn=zeros(rows, columns),
            logprobs=zeros(rows, columns, dtype=torch.float32),
            sampling_logprobs=zeros(rows, columns, dtype=torch.float32),
            seen=zeros(rows, seen, dtype=torch.bool) if seen else None,
        )

    def part(self, start: int, end: int) -> "RowState":
        """Views of the rows `start` … `end`."""
        views: dict[str, Any] = vars(self)
        views = {k: None if v is None else v.narrow(0, start, end - start) for k, v in views.items()}
        return RowState(**views)

    def permute(self, rows: Tensor) -> None:
        """Moves `rows` [n] to the first n places, except for the fields that the host rewrites."""
        for buffer in (
            self.tokens,
            self.counters,
            self.finished,
            self.drawn,
            self.logprobs,
            self.sampling_logprobs,
            self.seen,
        ):
            if buffer is not None:
                buffer[: len(rows)] = buffer[rows]


class Ended(NamedTuple):
    """A sequence that has ended, its tensors on the host."""

    sequence: Sequence
    tokens: Tensor
    """[C] int64"""
    logprobs: Tensor
    """[C] float32"""
    sampling_logprobs: Tensor
    """[C] float32"""


class Runner:
    """The decode buffers, the KV cache, and the step over them."""

    def __init__(
        self,
        decoder: Decoder,
        limits: Limits,
        page_size: int,
        params: SampleParams,
        *,
        eos_ids: list[int],
        suppressed: list[int],
        cuda_graphs: bool,
    ) -> None:
        device = decoder.device
        self.decoder = decoder
        self.limits = limits
        self.page_size = page_size
        self.params = params
        self.cache = KVCache.empty(decoder.shape, limits.pages, page_size, decoder.dtype, device, limits.rows)
        vocabulary = decoder.shape.vocabulary
        self.state = RowState.empty(limits, vocabulary if params.repetition_penalty != 1.0 else 0, device)
        self.prefix_tables = torch.zeros(limits.groups, limits.prefix_pages, dtype=torch.int32, device=device)
        self.prefix_lens = torch.zeros(limits.groups, dtype=torch.int32, device=device)
        self.cu_prefix_rows = torch.zeros(limits.groups + 1, dtype=torch.int32, device=device)
        self.eos_ids = torch.tensor(list(eos_ids), device=device)
        self.suppressed = torch.zeros(vocabulary, dtype=torch.bool, device=device) if suppressed else None
        if self.suppressed is not None:
            self.suppressed.index_fill_(0, torch.tensor(list(suppressed), device=device), True)
        self.graphs = StepGraphs(self.state.finished) if cuda_graphs else None
        self.rows: list[Sequence] = []
        """The sequence in each row; ended ones stay until the next `arrange`."""

    # The step

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """Draws `steps` more tokens for every row; a row that ends in between draws no more."""
        count = len(self.rows) if self.graphs is None else self.bucket(len(self.rows))
        for _ in range(steps):
            if self.graphs is None:
                self.step(count)
            else:
                self.graphs.replay(count, lambda: self.step(count))

    def step(self, rows: int) -> None:
        """Draws one token for each of the first `rows` rows. Reads no value on the host; no shape depends on one."""
        state = self.state.part(0, rows)
        active = state.finished.logical_not()
        # Each row's own tokens in the cache. Clamped, since finished rows may be past the end of their table.
        cached = (state.counters - 1).clamp_(0, max(0, self.limits.max_new_tokens - 2))
        pages = state.suffix_tables.gather(1, (cached // self.page_size).unsqueeze(1)).squeeze(1)
        slots = torch.where(active, pages * self.page_size + cached % self.page_size, -1)
        layout = PagedLayout(
            suffix_tables=state.suffix_tables,
            suffix_lens=(state.counters * active).int(),
            prefix_tables=self.prefix_tables,
            prefix_lens=self.prefix_lens,
            prefix_ids=state.prefix_ids,
            cu_prefix_rows=self.cu_prefix_rows,
        )
        logits = self.decoder.decode(state.tokens, state.starts + cached, slots, layout, self.cache)
        self._draw(logits, state, active)

    def _draw(self, logits: Tensor, state: RowState, active: Tensor) -> None:
        """Draws from logits [B, V]; stores tokens, log-probs and which rows have ended."""
        with span("rollout/sample"):  # in a replayed graph, part of `rollout/decode`
            output = sample(
                logits,
                self.params,
                seeds=state.seeds,
                counters=state.counters,
                seen=state.seen,
                suppressed=self.suppressed,
            )
            token = output.tokens.unsqueeze(1)
            column = torch.where(active, state.counters, self.limits.max_new_tokens).unsqueeze(1)
            state.drawn.scatter_(1, column, token)
            state.logprobs.scatter_(1, column, output.logprobs.unsqueeze(1))
            state.sampling_logprobs.scatter_(1, column, output.sampling_logprobs.unsqueeze(1))
            torch.where(active, output.tokens, state.tokens, out=state.tokens)
            if state.seen is not None:
                state.seen.scatter_(1, token, state.seen.gather(1, token) | active.unsqueeze(1))
            state.counters.add_(active)
            is_end = (token == self.eos_ids).any(dim=1) | (state.counters >= self.limits.max_new_tokens)
            state.finished.logical_or_(is_end)

    # Between steps

    def bucket(self, rows: int) -> int:
        """Rows that a step runs for; with CUDA graphs, the next power of two."""
        if self.graphs is None:
            return rows
        return min(1 << (rows - 1).bit_length(), self.limits.rows) if rows else 0

    def is_sparse(self, running: int) -> bool:
        """Whether enough rows have ended that dropping them pays for moving the others."""
        if self.graphs is None:
            return running < len(self.rows)
        return self.bucket(running) < self.bucket(len(self.rows))

    def arrange(self, running: list[Sequence]) -> None:
        """Assigns rows to the sequences, in order; a prompt's must be adjacent, new ones must come last.

        New sequences draw their first token from their group's `first_logits`.
        """
        old = [sequence.row for sequence in running if sequence.row is not None]
        assert len(running) <= self.limits.rows
        assert all(sequence.row is not None for sequence in running[: len(old)])
        if old != list(range(len(old))):
            rows = self._to_device(old, torch.int64)
            self.state.permute(rows)
            for state in self.cache.states:
                state[: len(old)] = state[rows]
        previous, self.rows = len(self.rows), list(running)
        for row, sequence in enumerate(running):
            sequence.row = row
        self._write_tables(running, previous)
        if len(old) < len(running):
            self._draw_first(len(old))

    def _write_tables(self, running: list[Sequence], previous: int) -> None:
        """Writes the per-row fields that the host sets; rows no longer in use become idle."""
        count, groups = len(running), list(dict.fromkeys(sequence.group for sequence in running))
        state, place = self.state, {id(group): i for i, group in enumerate(groups)}
        idle = state.part(count, max(count, previous))
        idle.finished.fill_(True)
        idle.counters.zero_()
        idle.prefix_ids.fill_(-1)
        if not running:
            return
        state.seeds[:count] = self._to_device([s.seed for s in running], torch.int64)
        starts = {id(group): int(group.prompt.position_ids.max()) + 1 for group in groups}
        state.starts[:count] = self._to_device([starts[id(s.group)] for s in running], torch.int64)
        state.prefix_ids[:count] = self._to_device([place[id(s.group)] for s in running], torch.int32)
        if self.limits.suffix_pages:
            state.suffix_tables[:count, : len(running[0].pages)] = self._to_device(
                [s.pages for s in running], torch.int32
            )
        width = self.limits.prefix_pages
        tables = [group.pages + [0] * (width - len(group.pages)) for group in groups]
        self.prefix_tables[: len(groups)] = self._to_device(tables, torch.int32)
        self.prefix_lens[: len(groups)] = self._to_device([group.length for group in groups], torch.int32)
        sizes = Counter(id(sequence.group) for sequence in running)
        ends = [0, *accumulate(sizes[id(group)] for group in groups)]
        self.cu_prefix_rows.fill_(count)
        self.cu_prefix_rows[: len(ends)] = self._to_device(ends, torch.int32)

    def _draw_first(self, start: int) -> None:
        state, sequences = self.state.part(start, len(self.rows)), self.rows[start:]
        state.counters.zero_()
        state.finished.fill_(False)
        if state.seen is not None:
            state.seen.fill_(False)
            for row, sequence in zip(state.seen, sequences, strict=True):
                row[sequence.group.prompt.input_ids.to(row.device)] = True
        for i, buffer in enumerate(self.cache.states):
            buffer[start : len(self.rows)] = torch.cat([sequence.group.states[i] for sequence in sequences])
        logits = [_first_logits(sequence.group) for sequence in sequences]
        self._draw(torch.cat(logits), state, state.finished.logical_not())

    def stop(self, rows: list[int]) -> None:
        """Ends these rows with the tokens they have."""
        if rows:
            self.state.finished[self._to_device(rows, torch.int64)] = True

    def ended(self) -> list["Ended"]:
        """The sequences that have ended since the last call. Waits for the device."""
        state = self.state.part(0, len(self.rows))
        lengths = torch.where(state.finished, state.counters, 0).tolist()
        rows = [row for row, length in enumerate(lengths) if length and self.rows[row].row is not None]
        if not rows:
            return []
        index = self._to_device(rows, torch.int64)
        columns = [b[index].cpu() for b in (state.drawn, state.logprobs, state.sampling_logprobs)]
        results = []
        for i, row in enumerate(rows):
            sequence, length = self.rows[row], lengths[row]
            sequence.row = None
            drawn, logprobs, sampling_logprobs = (column[i, :length].clone() for column in columns)
            results.append(Ended(sequence, drawn, logprobs, sampling_logprobs))
        return results

    def _to_device(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.decoder.device, non_blocking=True)


def _first_logits(group: PromptGroup) -> Tensor:
    assert group.first_logits is not None, "a sequence runs before its prompt was prefilled"
    return group.first_logits
