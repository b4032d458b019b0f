"""Exact speculation: a decode step computes guessed tokens along with the last one, and keeps those that are right.

The token at a position is a function of the logits there, so a guess can be checked: the step draws at every position,
and a position counts if all guesses before it equal what was drawn. What comes out is what single steps give, up to
floating-point order. The positions of a row are rows of one decode step that read the same pages, each as far as its
own token; what a wrong guess wrote to the cache is written again by the right one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from fastgrpo_kernels import PagedLayout, sample
from fastgrpo_profiling import span
from torch import Tensor

from fastgrpo.sampler.guesser import LONGEST, Guesser
from fastgrpo.sampler.runner import RowState, Runner

FREE_ROWS = {"cpu": 30, "cuda": 240}
"""Rows that take as long as what a step takes anyway. CPU: of the demo's model 3.4 ms and 0.030 ms a row, so 110; with
70 a rollout was no faster than with 30. GPU: by count, an H100 reads the weights of a 2B model as long as it computes
240 rows of it; not measured."""
NEARLY = 0.8
"""Of what they should be, how often guesses on a CPU must be right to go on."""
PATIENCE, REST = 100, 16
"""After so many steps of a CPU without a guess that was right, one is looked for in every sixteenth step alone."""
FORGET = 0.9
"""What a check's counts of right guesses weigh at the next."""


class Acceptance:
    """How often the guess at each place was right, of late."""

    def __init__(self, most: int) -> None:
        self.right, self.asked = [0.0] * (most + 1), [0.0] * (most + 1)
        self.idle = 0
        """Steps since a guess was right."""
        self.begin()

    def begin(self) -> None:
        """Begins a rollout: `tokens` kept, and `row_steps` that rows took for them, count from here."""
        self.tokens = self.row_steps = 0

    def add(self, right: list[int], asked: list[int], kept: int) -> None:
        """Counts by place; place 0 is the last token, which is never wrong. `kept`: how many tokens came of it."""
        self.tokens += kept
        self.row_steps += right[0]
        if any(right[1:]):
            self.idle = 0
        self.right = [FORGET * old + new for old, new in zip(self.right, right, strict=True)]
        self.asked = [FORGET * old + new for old, new in zip(self.asked, asked, strict=True)]

    def pays(self, rows: int, free: int) -> bool:
        """Whether guesses that seemed likely enough to be worth it were right about as often."""
        right, asked = sum(self.right[1:]) + 0.5, sum(self.asked[1:]) + 0.5
        return right * (rows + free) >= NEARLY * asked * rows

    def best(self, rows: int, free: int) -> int:
        """The number of guesses, 0, 1, 3, 7 … or all, that promises most tokens for its time.

        A place that was not asked for of late is taken to be right half as often as the one before: it is tried again.
        """
        rates = [
            (n + 2 * 0.5**i) / (asked + 2) for i, (n, asked) in enumerate(zip(self.right, self.asked, strict=True))
        ]
        most = len(rates) - 1
        counts = [(1 << n) - 1 for n in range(most.bit_length()) if (1 << n) - 1 < most] + [most]
        return max(counts, key=lambda count: (1 + sum(rates[1 : count + 1])) / (free + rows * (count + 1)))


@dataclass(frozen=True)
class Speculation:
    """What is kept from rollout to rollout."""

    guesser: Guesser
    acceptance: Acceptance


class SpeculativeRunner(Runner):
    """`Runner` whose steps take up to `most` guesses a row."""

    def __init__(self, *args: Any, speculation: Speculation, **options: Any) -> None:
        super().__init__(*args, **options)
        self.guesser, self.acceptance = speculation.guesser, speculation.acceptance
        self.most = len(self.acceptance.right) - 1
        device = self.decoder.device
        self.is_ragged = device.type == "cpu"
        """Whether a row has as many guesses as are likely to be right. Else all have the same number, for a graph."""
        self.free = FREE_ROWS["cpu" if self.is_ragged else "cuda"]
        self.offsets = torch.arange(-LONGEST, self.most + 1, device=device)
        self.every = torch.arange(self.limits.rows * (self.most + 1) + 1, device=device)
        self.counts = torch.zeros(2, self.most + 1, dtype=torch.int64, device=device)
        """Positions that were kept, and that were computed, since the host last looked."""

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """Takes `steps` steps: a row draws a token in each, and those it guessed right."""
        count = len(self.rows) if self.graphs is None else self.bucket(len(self.rows))
        if self.is_ragged:
            guesses = self.most if self.acceptance.pays(count, self.free) else 0
        else:
            guesses = self.acceptance.best(count, self.free)
        for _ in range(steps):
            if self.graphs is None:
                self.verify(count, guesses)
            else:
                self.graphs.replay((count, guesses), lambda: self.verify(count, guesses))
        right, asked = self.counts.tolist()
        self.counts.zero_()
        kept = sum(right) if guesses else right[0]
        self.acceptance.add(right, asked, kept)
        self.guesser.age(kept)

    def _single(self, rows: int, active: Tensor, guess: Tensor) -> None:
        """`Runner.step`, where no guess pays: those there are [R] are only compared."""
        state, counters = self.state.part(0, rows), self.state.counters[:rows].clone()
        self.step(rows)
        self.guesser.learn(self._tokens(state, counters, 1), active.unsqueeze(1))
        asked = active & (guess >= 0)
        right = asked & (guess == state.tokens)
        self.counts[:, :2] += torch.stack((active, right, active, asked)).sum(dim=1).view(2, 2)

    def _least(self, active: Tensor) -> float:
        """How likely a guess must be to be worth its time: a position more in a step of the rows there are."""
        return (busy := int(active.sum())) / (busy + self.free) if self.is_ragged else 0.0

    def verify(self, rows: int, guesses: int) -> None:
        """Draws tokens for the first `rows` rows; on CUDA reads no value on the host, no shape depends on one.

        0 guesses on a CPU: one is made to be compared.
        """
        state, most = self.state.part(0, rows), self.limits.max_new_tokens
        active, width = state.finished.logical_not(), guesses + 1
        self.acceptance.idle += 1
        if self.is_ragged and self.acceptance.idle > PATIENCE and self.acceptance.idle % REST:
            self.step(rows)
            self.counts[:, 0] += active.sum()
            return
        offsets = self.offsets[LONGEST : LONGEST + width]
        last = self._tokens(state, state.counters, 0).flip(1)
        guessed = self.guesser.guess(last, max(guesses, 1) if self.is_ragged else guesses, self._least(active))
        if self.is_ragged and (not guesses or not bool((guessed >= 0).any())):
            self._single(rows, active, guessed[:, 0])
            return
        tokens = torch.cat((state.tokens.unsqueeze(1), guessed), dim=1)  # [R, Q]
        counters = state.counters.unsqueeze(1) + offsets  # of the token drawn at each position
        live = active.unsqueeze(1) & (tokens >= 0) & (counters < most)
        if self.is_ragged:
            at = live.flatten().nonzero().squeeze(1)  # [N]
            ends = live.sum(dim=1).cumsum(0)
            bounds = torch.cat((torch.zeros_like(ends[:1]), ends))
        else:
            at, bounds = self.every[: rows * width], self.every[: rows * width + 1 : width]
        row = at // width
        picked = state.starts, state.seeds, state.suffix_tables, state.prefix_ids
        starts, seeds, suffix_tables, prefix_ids = (tensor.index_select(0, row) for tensor in picked)
        token, counter, is_live = (grid.flatten().index_select(0, at) for grid in (tokens, counters, live))
        cached = (counter - 1).clamp_(0, max(0, most - 2))
        pages = suffix_tables.gather(1, (cached // self.page_size).unsqueeze(1)).squeeze(1)
        layout = PagedLayout(
            suffix_tables=suffix_tables,
            suffix_lens=(counter * is_live).int(),
            prefix_tables=self.prefix_tables,
            prefix_lens=self.prefix_lens,
            prefix_ids=prefix_ids,
            cu_prefix_rows=bounds.index_select(0, self.cu_prefix_rows.clamp(max=rows)).int(),
            is_shared=True,
        )
        slots = torch.where(is_live, pages * self.page_size + cached % self.page_size, -1)
        logits = self.decoder.decode(token.clamp(min=0), starts + cached, slots, layout, self.cache)
        with span("rollout/sample"):
            output = sample(
                logits,
                self.params,
                seeds=seeds,
                counters=counter,
                seen=self._seen(state, tokens, row, offsets.index_select(0, at % width)),
                suppressed=self.suppressed,
            )
            drawn, *logprobs = (value.new_zeros(rows * width).index_copy_(0, at, value) for value in output)
            self._keep(state, tokens, live, counters, drawn.view(rows, width), *(v.view(rows, width) for v in logprobs))

    def _keep(
        self,
        state: RowState,
        tokens: Tensor,
        live: Tensor,
        counters: Tensor,
        drawn: Tensor,
        logprobs: Tensor,
        sampling_logprobs: Tensor,
    ) -> None:
        """Stores what was drawn at positions [R, Q] whose guesses are all right, up to an end token."""
        width, active = tokens.shape[1], live[:, :1]
        is_end = (drawn.unsqueeze(2) == self.eos_ids).any(dim=2)
        goes_on = (tokens[:, 1:] == drawn[:, :-1]) & is_end[:, :-1].logical_not()
        right = torch.cat((active, live[:, 1:] & goes_on), dim=1).int().cumprod(dim=1).bool()  # [R, Q]
        column = torch.where(right, counters, self.limits.max_new_tokens)
        state.drawn.scatter_(1, column, drawn)
        state.logprobs.scatter_(1, column, logprobs)
        state.sampling_logprobs.scatter_(1, column, sampling_logprobs)
        self.guesser.learn(self._tokens(state, state.counters, width), right)
        count = right.sum(dim=1)
        last = drawn.gather(1, (count - 1).clamp_(min=0).unsqueeze(1)).squeeze(1)
        torch.where(active.squeeze(1), last, state.tokens, out=state.tokens)
        if state.seen is not None:
            kept = torch.where(right, drawn, drawn[:, :1])  # of an active row, the first is always right
            state.seen.scatter_(1, kept, state.seen.gather(1, kept) | active)
        state.counters.add_(count)
        state.finished.logical_or_((is_end & right).any(dim=1) | (state.counters >= self.limits.max_new_tokens))
        self.counts[:, :width] += torch.stack((right.sum(dim=0), live.sum(dim=0)))

    def _tokens(self, state: RowState, counters: Tensor, new: int) -> Tensor:
        """[R, LONGEST + new]: each row's tokens before place `counters` and the next `new`; −1 before its first."""
        columns = counters.unsqueeze(1) + self.offsets[: LONGEST + new]
        tokens = state.drawn.gather(1, columns.clamp(0, self.limits.max_new_tokens))
        return torch.where(columns >= 0, tokens, -1)

    def _seen(self, state: RowState, tokens: Tensor, row: Tensor, offset: Tensor) -> Tensor | None:
        """[N, V]: what the repetition penalty is for at positions `offset` [N] of rows [N], guesses before included."""
        if state.seen is None:
            return None
        before = self.offsets[LONGEST : LONGEST + tokens.shape[1]] <= offset.unsqueeze(1)  # [N, Q]
        mine = tokens.index_select(0, row)
        mine = torch.where(before, mine, mine[:, :1]).clamp_(min=0)  # the last token drawn is among the seen anyway
        return state.seen.index_select(0, row).scatter_(1, mine, True)
