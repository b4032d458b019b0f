"""Random schedules, some of them broken off: what is drawn is what each prompt gives alone, and no page is lost."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from campaign import RESULTS, report

from fastgrpo.sampler import engine as sampler_engine
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.sampler.scheduler import Scheduler
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams

ENDS = [5, 77, 130, 211, 300]
TEMPERATURES = [1.5, 1.5, 1.5, 0.0, 1e-6, 0.05, 50.0, 1e6]
BREAKS = ["no", "no", "aborts", "aborts", "closed", "dropped", "thrown into", "a tokenizer that raises"]
TRIALS = 1000 if RESULTS else 60


class CallerError(Exception):
    """What a caller raises between two groups."""


class RaisingTokenizer:
    """A tokenizer that fails after so many calls."""

    def __init__(self, tokenizer: Any, calls: int) -> None:
        self.tokenizer, self.calls = tokenizer, calls

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        self.calls -= 1
        if self.calls < 0:
            raise CallerError
        texts: list[str] = self.tokenizer.batch_decode(*args, **kwargs)
        return texts


@dataclass
class Schedule:
    """One random call of the sampler."""

    prompts: list[Prompt]
    group: int
    params: SamplingParams
    options: SamplerOptions

    @classmethod
    def drawn(cls, rng: random.Random, trial: int) -> "Schedule":
        size = rng.choice([4, 8, 16])
        new_tokens = rng.choice([1, 2, 9, 17])
        lengths = rng.choices([1, 1, 3, 8, 16, 40], k=rng.randint(1, 5))
        draw = torch.Generator().manual_seed(trial)
        prompts = [
            Prompt(
                trial * 10 + i,
                torch.randint(1, 350, (length,), generator=draw),
                torch.arange(length).expand(3, -1),
                None,
                None,
                "",
            )
            for i, length in enumerate(lengths)
        ]
        pages = max(-(-length // size) for length in lengths) + -(-(new_tokens - 1) // size)
        options = SamplerOptions(
            max_rows=rng.randint(1, 8),
            max_cache_tokens=size * (pages + rng.choice([0, 0, rng.randint(0, 12)])),
            page_size=size,
            prefill_tokens=rng.randint(1, 50),
            steps_per_check=rng.randint(1, 6),
        )
        params = SamplingParams(new_tokens, temperature=rng.choice(TEMPERATURES), seed=trial)
        return cls(prompts, rng.choice([1, 2, 5]), params, options)

    def on(self, engine: SamplerEngine) -> Iterator[Rollout]:
        engine.options, engine.runner, engine.eos_ids = self.options, None, ENDS
        engine.prefill.max_tokens = self.options.prefill_tokens
        return engine.generate(self.prompts, self.group, self.params, step=3)

    def alone(self, engine: SamplerEngine) -> dict[int, tuple[Completion, ...]]:
        """What each prompt gives in a call of its own."""
        calls = [Schedule([prompt], self.group, self.params, self.options) for prompt in self.prompts]
        return {prompt.row_id: found for call in calls for prompt, found in call.on(engine)}


def break_off(schedule: Schedule, engine: SamplerEngine, how: str, rng: random.Random) -> None:
    """A call that does not come to its end, or hardly."""
    tokenizer = engine.tokenizer
    if how == "a tokenizer that raises":
        engine.tokenizer = RaisingTokenizer(tokenizer, rng.randint(0, 3))
    rollouts = schedule.on(engine)
    try:
        for _ in range(rng.randint(0, len(schedule.prompts))):
            next(rollouts, None)
        if how == "thrown into":
            rollouts.throw(CallerError)  # type: ignore[attr-defined]
        if how == "closed":
            rollouts.close()  # type: ignore[attr-defined]
    except CallerError:
        pass
    engine.tokenizer = tokenizer
    del rollouts


def assert_equal(mine: Completion, alone: Completion, unwanted: set[int]) -> None:
    if mine.finish_reason == "abort":
        assert mine.row_id in unwanted
        assert mine.token_ids.tolist() == alone.token_ids[: len(mine.token_ids)].tolist()
        assert len(mine.token_ids) == len(mine.logprobs) < len(alone.token_ids)
        return
    assert mine.token_ids.tolist() == alone.token_ids.tolist()
    assert (mine.text, mine.finish_reason) == (alone.text, alone.finish_reason)
    torch.testing.assert_close(mine.logprobs, alone.logprobs, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(mine.sampling_logprobs, alone.sampling_logprobs, atol=1e-4, rtol=1e-6)


def test_random_schedules(
    qwen2_exact: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Scheduler] = []

    class Recorded(Scheduler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(sampler_engine, "Scheduler", Recorded)
    rng, found = random.Random(0), Counter[str]()
    engine = qwen2_exact.engine()
    for trial in range(TRIALS):
        schedule, how = Schedule.drawn(rng, trial), rng.choice(BREAKS)
        if how not in ("no", "aborts"):
            break_off(schedule, engine, how, rng)
        unwanted = {p.row_id for p in schedule.prompts if how == "aborts" and rng.random() < 0.4}
        together = {}
        for prompt, completions in schedule.on(engine):
            together[prompt.row_id] = completions
            for row in unwanted:
                engine.abort(row)
        assert made[-1].blocks.used == 0, "pages are lost"
        fresh = schedule.alone(qwen2_exact.engine())
        assert together.keys() == fresh.keys()
        for row, completions in together.items():
            for mine, alone in zip(completions, fresh[row], strict=True):
                assert_equal(mine, alone, unwanted)
        made.clear()
        found[how] += 1
    report(capsys, "schedules", found, trials=TRIALS)
