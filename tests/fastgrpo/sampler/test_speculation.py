"""Guesses change how many steps completions take, and nothing about them."""

import random
from typing import Any

import pytest
import torch
from chi_square import assert_drawn_from
from device_only import DeviceOnly, PlainIndexing
from family_parity import draw as family_draw
from family_parity import make_engine
from fastgrpo_kernels import SampleParams
from tiny_families import FAMILIES
from tiny_families import family as family_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.sampler.guesser import LONGEST, Guesser
from fastgrpo.sampler.packed_decoder import DecoderShape, PackedDecoder
from fastgrpo.sampler.runner import Limits
from fastgrpo.sampler.sequence import PromptGroup
from fastgrpo.sampler.speculation import Acceptance, Speculation, SpeculativeRunner
from fastgrpo.sampler.weight_sync import sync_weights
from fastgrpo.types import Prompt, SamplingParams

LIMITS = Limits(rows=8, groups=3, prefix_pages=4, suffix_pages=3, max_new_tokens=33, pages=64)
SETTINGS = [SampleParams(0.8, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.2), SampleParams()]
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.2},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 0.9, "top_p": 0.3, "repetition_penalty": 1.1},
    {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 1.5},
]


def test_only_right_guesses_keep_a_run_looking_for_them() -> None:
    acceptance = Acceptance(3)
    acceptance.idle = 5
    acceptance.add([4, 0, 0, 0], [4, 2, 0, 0], kept=4)
    assert acceptance.idle == 5
    acceptance.add([4, 1, 0, 0], [4, 2, 0, 0], kept=5)
    assert acceptance.idle == 0


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.finish_reason == theirs.finish_reason
    for name in ("logprobs", "sampling_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=0)


def draw(engine: SamplerEngine, prompts: Any, group: int, params: SamplingParams, unwanted: Any = ()) -> dict[int, Any]:
    found = {}
    for prompt, completions in engine.generate(prompts, group, params, step=3):
        found[prompt.row_id] = completions
        for row in unwanted:
            engine.abort(row)
    return found


@pytest.mark.parametrize("trials", [12, pytest.param(1300, marks=pytest.mark.slow)])
def test_guesses_change_no_token(qwen2_exact: Any, trials: int) -> None:
    """Random schedules, filters, penalties, end tokens, aborts; of the slow form more than 10,000 completions."""
    rng, drawn, gained = random.Random(0), 0, []
    torch.manual_seed(0)
    guessing, plain = qwen2_exact.engine(speculate=3), qwen2_exact.engine()
    known = [torch.randint(1, 350, (length,)) for length in (1, 3, 8, 16, 40)]
    for trial in range(trials):
        size, new_tokens, group = rng.choice([4, 8, 16]), rng.choice([1, 2, 9, 17, 33]), rng.choice([1, 2, 5])
        prompts = [
            Prompt(trial * 10 + i, ids, torch.arange(len(ids)).expand(3, -1), None, None, "")
            for i, ids in enumerate(rng.choices(known, k=rng.randint(1, 5)))
        ]
        pages = max(-(-len(p.input_ids) // size) for p in prompts) + -(-(new_tokens - 1) // size)
        guessing.options = SamplerOptions(
            max_rows=rng.randint(1, 12),
            max_cache_tokens=size * (pages + rng.randint(0, 12)),
            page_size=size,
            steps_per_check=rng.randint(1, 6),
        )
        for engine in (guessing, plain):
            engine.runner, engine.eos_ids = None, rng.choice([[], [5, 77, 130, 211, 300]])
        guessing.eos_ids = plain.eos_ids
        params = SamplingParams(new_tokens, seed=rng.choice([trial, 0]), **rng.choice(DRAWS))
        unwanted = {p.row_id for p in prompts if rng.random() < 0.15}
        ours, theirs = draw(guessing, prompts, group, params, unwanted), draw(plain, prompts, group, params)
        assert ours.keys() == theirs.keys() == {prompt.row_id for prompt in prompts}
        gained.append(guessing.accepted_per_step or 1.0)
        for row, completions in theirs.items():
            for mine, other in zip(ours[row], completions, strict=True):
                drawn += 1
                if mine.finish_reason == "abort":
                    assert row in unwanted
                    assert mine.token_ids.tolist() == other.token_ids[: len(mine.token_ids)].tolist()
                    assert len(mine.token_ids) == len(mine.logprobs) < len(other.token_ids)
                else:
                    assert_same(mine, other)
    assert sum(gained) / trials > 1.1, "too few guesses were right to test anything"
    assert trials < 1000 or drawn >= 10_000


@pytest.mark.parametrize("params", DRAWS[:4])
def test_what_is_guessed_has_the_models_own_logprobs(family: Any, params: dict[str, Any]) -> None:
    """With pictures, by transformers' forward pass; the second time nearly everything is guessed."""
    engine, prompts = family.engine(stops=False, speculate=7), list(family.prompts.values())
    settings = SamplingParams(24, seed=11, **params)
    for _ in range(2):
        groups = draw(engine, prompts, 2, settings)
    assert engine.accepted_per_step > 3
    if settings.top_k == 0 and settings.repetition_penalty == 1.0:
        for prompt in family.prompts.values():
            for completion in groups[prompt.row_id]:
                family.assert_logprobs(prompt, completion, settings.temperature or 1.0)


def test_tokens_behind_right_guesses_follow_the_models_distribution(qwen2: Any) -> None:
    """Chi-square of third tokens, most of them drawn where the second was guessed, behind the commonest two."""
    engine, ids = qwen2.engine(stops=False, speculate=3, max_rows=16), qwen2.prompts["5 tokens"].input_ids
    prompts = [Prompt(row, ids, torch.arange(len(ids)).expand(3, -1), None, None, "") for row in range(20)]
    groups = draw(engine, prompts, 100, SamplingParams(3, temperature=0.2))
    drawn = torch.stack([completion.token_ids for completions in groups.values() for completion in completions])
    assert engine.accepted_per_step > 1.2
    pairs, counts = drawn[:, :2].unique(dim=0, return_counts=True)
    pair = pairs[counts.argmax()]
    assert counts.max() > 500
    probs = (qwen2.logits(prompts[0], torch.cat((pair, pair[:1])))[-1] / 0.2).softmax(dim=-1)
    assert_drawn_from(drawn[(drawn[:, :2] == pair).all(dim=1), 2], probs)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("Qwen2")])
def test_other_families_draw_the_same_or_guess_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Windows, soft caps, experts; a layer's recurrent state cannot go back."""
    model, prompts = family_of(name)
    guessing = make_engine(model, speculate=3)
    for _ in range(2):
        ours = family_draw(guessing, prompts, 2, temperature=0.3)
    theirs = family_draw(make_engine(model), prompts, 2, temperature=0.3)
    for row, completions in theirs.items():
        for mine, other in zip(ours[row], completions, strict=True):
            assert_same(mine, other)
    if guessing.decoder.shape.state_sizes:
        assert guessing.accepted_per_step is None
        assert "linear attention cannot take one back" in caplog.text
    else:
        assert guessing.accepted_per_step > 2


def test_steps_are_saved_where_completions_resemble_each_other(qwen2: Any) -> None:
    """The second of two equal rollouts."""
    steps = []
    for options in ({"speculate": 3}, {}):
        engine, calls = qwen2.engine(stops=False, **options), []
        decode = engine.decoder.decode
        for _ in range(2):
            engine.decoder.decode = lambda *inputs, decode=decode, calls=calls: (calls.append(1), decode(*inputs))[1]
            calls.clear()
            draw(engine, list(qwen2.prompts.values()), 4, SamplingParams(32, temperature=0.0))
        steps.append(len(calls))
    assert 2 * steps[0] < steps[1] == 31


def make_runner(decoder: PackedDecoder, params: SampleParams, cuda_graphs: bool = False) -> SpeculativeRunner:
    speculation = Speculation(Guesser(decoder.device), Acceptance(3))
    ends = {"eos_ids": [0, 7], "suppressed": [3]}
    return SpeculativeRunner(decoder, LIMITS, 16, params, speculation=speculation, cuda_graphs=cuda_graphs, **ends)


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize(("rows", "guesses"), [(1, 3), (8, 3), (8, 0)])
def test_the_step_stays_on_a_cuda_device(qwen2_vl: Any, params: SampleParams, rows: int, guesses: int) -> None:
    """The CUDA branch, on CUDA tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        runner = make_runner(PackedDecoder(DecoderShape.of(qwen2_vl.model), torch.bfloat16, "cuda"), params)
        before = {name: value for name, value in vars(runner.state).items() if value is not None}
        with DeviceOnly() as mode, PlainIndexing():
            runner.verify(rows, guesses)
        assert mode.calls > 20
        assert all(getattr(runner.state, name) is value for name, value in before.items())


def start(runner: SpeculativeRunner, group: PromptGroup) -> None:
    """The group's completions in rows 0, 1, …, of a prompt that is not in the cache."""
    for cache in (*runner.cache.keys, *runner.cache.values):
        cache.fill_(0.1)
    group.pages = [0, 1, 2]
    group.first_logits = torch.linspace(-1, 1, runner.decoder.shape.vocabulary, device=runner.decoder.device)[None]
    for sequence in group.sequences:
        sequence.pages = [10 + 3 * sequence.index + i for i in range(3)]
    runner.arrange(group.sequences)


@pytest.mark.parametrize("is_ragged", [True, False])
def test_rows_that_have_ended_stand_still(qwen2_vl: Any, is_ragged: bool) -> None:
    """In the step of a CPU and in that of a graph, run here; so a capture's trial steps change nothing."""
    decoder = PackedDecoder(DecoderShape.of(qwen2_vl.model), torch.float32, "cpu")
    sync_weights(decoder, qwen2_vl.model)
    runner = make_runner(decoder, SETTINGS[0])
    runner.is_ragged = is_ragged
    start(runner, PromptGroup.of(qwen2_vl.prompts["no image"], 4, seed=0, step=0))
    state = runner.state
    state.finished[:] = True
    state.finished[2] = False
    names = ("tokens", "counters", "finished", "drawn", "logprobs", "sampling_logprobs", "seen")
    still = [0, 1, 3, 4, 5, 6, 7]
    before = {name: getattr(state, name)[still].clone() for name in names}
    for _ in range(3):
        runner.verify(4, 3)
    for name, old in before.items():
        new = getattr(state, name)[still]
        equal = torch.equal(new[:, :-1], old[:, :-1]) if "prob" in name or name == "drawn" else torch.equal(new, old)
        assert equal, name
    assert 4 <= state.counters[2] <= 13
    written = (runner.cache.keys[1] != 0.1).flatten(1).any(1).nonzero().flatten()
    assert written.tolist() == [16]  # row 2's first page
    learnt = int(runner.guesser.totals[:-1].sum())
    assert learnt == LONGEST * (int(state.counters[2]) - 1)


def test_both_kinds_of_step_draw_the_same(qwen2_vl_exact: Any) -> None:
    """Rows with as many guesses as are sure, and all with the same number."""
    decoder = PackedDecoder(DecoderShape.of(qwen2_vl_exact.model), torch.float64, "cpu")
    sync_weights(decoder, qwen2_vl_exact.model)
    drawn = []
    for is_ragged in (True, False):
        runner = make_runner(decoder, SETTINGS[0])
        runner.is_ragged = is_ragged
        start(runner, PromptGroup.of(qwen2_vl_exact.prompts["no image"], 7, seed=0, step=0))
        runner.run(32)
        assert runner.state.finished[:7].all()
        drawn.append([ended.tokens.tolist() for ended in runner.ended()])
    assert drawn[0] == drawn[1]


@pytest.mark.gpu
@pytest.mark.parametrize("params", SETTINGS)
def test_graphs_draw_what_the_eager_step_draws(qwen2_vl: Any, params: SampleParams) -> None:
    """In bf16 on a GPU; a smaller bucket after the largest."""
    decoder = PackedDecoder(DecoderShape.of(qwen2_vl.model), torch.bfloat16, "cuda")
    sync_weights(decoder, qwen2_vl.model)
    drawn = []
    for graphs in (False, True):
        runner, group = (
            make_runner(decoder, params, graphs),
            PromptGroup.of(qwen2_vl.prompts["no image"], 7, seed=0, step=0),
        )
        start(runner, group)
        runner.run(5)
        runner.arrange(group.sequences[:3])
        runner.run(5)
        drawn.append(runner.state.drawn[:3, :8].tolist())
    assert drawn[0] == drawn[1]
