"""`sample`: which tokens, under which distribution, and with which log-probs."""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chi_square import assert_drawn_from
from fastgrpo_kernels import SampleOutput, SampleParams, sample
from fastgrpo_kernels.backend import Backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

BACKENDS: list[Backend] = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SETTINGS: dict[str, SampleParams] = {
    "plain": SampleParams(),
    "temperature": SampleParams(temperature=0.7),
    "top_k": SampleParams(top_k=12),
    "top_p": SampleParams(top_p=0.8),
    "min_p": SampleParams(min_p=0.1),
    "penalty": SampleParams(repetition_penalty=1.4),
    "all": SampleParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    "greedy": SampleParams(temperature=0.0, top_k=3, repetition_penalty=1.4),
}


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """`torch.empty` and the like give NaN in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(count: int, vocabulary: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, seeds, counters, seen, suppressed."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(count, vocabulary, generator=generator)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    counters = torch.randint(1000, (count,), generator=generator)
    seen = torch.rand(count, vocabulary, generator=generator) < 0.2
    suppressed = torch.rand(vocabulary, generator=generator) < 0.1
    logits, seeds, counters, seen, suppressed = (x.to(DEVICE) for x in (logits, seeds, counters, seen, suppressed))
    return logits, seeds, counters, seen, suppressed


def warped(logits: Tensor, params: SampleParams, seen: Tensor, suppressed: Tensor) -> Tensor:
    """Hugging Face's processed scores of logits [B, V], in float64."""
    chain: list[Any] = [SuppressTokensLogitsProcessor(suppressed.nonzero().squeeze(1).tolist(), device=DEVICE)]
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature > 0:
        chain.append(TemperatureLogitsWarper(params.temperature or 1.0))
        chain += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        chain += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        chain += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    processors = LogitsProcessorList(chain)
    results = []
    for row, seen_row in zip(logits.double(), seen, strict=True):
        ids = seen_row.nonzero().T if seen_row.any() else torch.empty(1, 0, dtype=torch.int64, device=DEVICE)
        results.append(processors(ids, row[None].clone()))
    return torch.cat(results)


def draw(
    logits: Tensor, params: SampleParams, seeds: Tensor, counters: Tensor, backend: Backend | None = None, **masks: Any
) -> SampleOutput:
    return sample(logits, params, seeds=seeds, counters=counters, backend=backend, **masks)


@pytest.mark.parametrize("varying", ["seeds", "counters"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "greedy"])
def test_draws_follow_hugging_faces_distribution(name: str, varying: str) -> None:
    logits, _, _, seen, suppressed = rows(1, 97)
    probs = warped(logits, SETTINGS[name], seen, suppressed).softmax(dim=-1)[0]
    numbers, fixed = torch.arange(40_000, device=DEVICE), torch.full((40_000,), 3, device=DEVICE)
    seeds, counters = (numbers, fixed) if varying == "seeds" else (fixed, numbers)
    many = logits.expand(len(numbers), -1)
    output = draw(many, SETTINGS[name], seeds, counters, "torch", seen=seen.expand_as(many), suppressed=suppressed)
    assert_drawn_from(output.tokens, probs)
    assert not suppressed[output.tokens].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_log_probs_are_exact(name: str, backend: Backend) -> None:
    params = SETTINGS[name]
    logits, seeds, counters, seen, suppressed = rows(4, 1021)
    output = draw(logits, params, seeds, counters, backend, seen=seen, suppressed=suppressed)
    chosen = output.tokens[:, None]
    full = (logits.double() / (params.temperature or 1.0)).log_softmax(dim=-1).gather(1, chosen).squeeze(1)
    drawn_from = warped(logits, params, seen, suppressed).log_softmax(dim=-1).gather(1, chosen).squeeze(1)
    assert output.tokens.dtype == torch.int64
    assert output.logprobs.dtype == output.sampling_logprobs.dtype == torch.float32
    torch.testing.assert_close(output.logprobs.double(), full, atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(output.sampling_logprobs.double(), drawn_from, atol=3e-6, rtol=0)


@pytest.fixture(params=["split", "whole"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary cut into a split for every block, as for a few rows, and not cut at all, as for many."""
    if request.param == "whole":
        monkeypatch.setattr(importlib.import_module("fastgrpo_kernels.sampling"), "PROGRAMS", 1)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("vocabulary", [1, 2, 1024, 1025, 4099])
def test_both_backends_draw_the_same_tokens(vocabulary: int) -> None:
    logits, seeds, counters, seen, suppressed = rows(2, vocabulary)
    suppressed[0] = False
    for params in (SETTINGS["plain"], SETTINGS["all"], SETTINGS["greedy"]):
        expected, actual = (
            draw(logits, params, seeds, counters, backend, seen=seen, suppressed=suppressed) for backend in BACKENDS
        )
        assert torch.equal(expected.tokens, actual.tokens)
        torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=3e-6, rtol=1e-6)
        torch.testing.assert_close(actual.sampling_logprobs, expected.sampling_logprobs, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_draw_depends_on_nothing_but_its_own_row(name: str, backend: Backend) -> None:
    logits, seeds, counters, seen, suppressed = rows(4, 700)
    masks = {"seen": seen, "suppressed": suppressed}
    whole = draw(logits, SETTINGS[name], seeds, counters, backend, **masks)
    order = torch.tensor([3, 1], device=DEVICE)
    masks["seen"] = seen[order]
    part = draw(logits[order], SETTINGS[name], seeds[order], counters[order], backend, **masks)
    assert torch.equal(part.tokens, whole.tokens[order])
    torch.testing.assert_close(part.logprobs, whole.logprobs[order], atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_lowest_id_of_equals(backend: Backend) -> None:
    logits = torch.zeros(2, 2100, device=DEVICE)
    logits[0, [5, 1029, 2050]] = 1.0  # 5 and 1029 fall to one lane
    logits[1, [2050, 2099]] = 1.0
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert draw(logits, SETTINGS["greedy"], zeros, zeros, backend).tokens.tolist() == [5, 2050]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("params", [SampleParams(top_k=2), SampleParams(top_p=0.5), SampleParams(min_p=1.0)])
def test_tokens_tied_with_the_last_that_stays_stay_too(params: SampleParams, backend: Backend) -> None:
    logits = torch.full((200 if backend == "torch" else 3, 9), -3.0, device=DEVICE)
    logits[:, [1, 4, 7]] = 2.0
    seeds = torch.arange(len(logits), device=DEVICE)
    output = draw(logits, params, seeds, seeds, backend)
    drawn = set(output.tokens.tolist())
    assert drawn == {1, 4, 7} or (backend == "triton" and drawn < {1, 4, 7})
    torch.testing.assert_close(output.sampling_logprobs, torch.full_like(output.logprobs, -math.log(3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend: Backend) -> None:
    logits = torch.full((3, 300), -1e4, device=DEVICE)
    logits[0, 7] = 1e4
    logits[1, :] = -math.inf
    logits[1, 8] = 0.0
    logits[2, 9] = -5e3
    seeds = torch.arange(3, device=DEVICE)
    for params in (SETTINGS["plain"], SETTINGS["all"], SETTINGS["greedy"]):
        output = draw(logits, params, seeds, seeds, backend)
        assert output.tokens.tolist() == [7, 8, 9]
        assert (output.logprobs == 0).all()
        assert (output.sampling_logprobs == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_gives_a_token_of_the_vocabulary(backend: Backend) -> None:
    logits = torch.full((2, 300), math.nan, device=DEVICE)
    logits[1] = -math.inf
    seeds = torch.arange(2, device=DEVICE)
    for params in (SETTINGS["plain"], SETTINGS["all"], SETTINGS["greedy"]):
        tokens = draw(logits, params, seeds, seeds, backend).tokens
        assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_strided_logits(backend: Backend) -> None:
    logits, seeds, counters, *_ = rows(3, 501)
    half = logits.half()
    wide = torch.zeros(3, 640, dtype=torch.float16, device=DEVICE)
    wide[:, :501] = half
    for params in (SETTINGS["plain"], SETTINGS["top_p"]):
        expected = draw(half.float(), params, seeds, counters, backend)
        actual = draw(wide[:, :501], params, seeds, counters, backend)
        assert torch.equal(actual.tokens, expected.tokens)
        torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter mis-computes bfloat16")
@pytest.mark.parametrize("name", SETTINGS)
def test_bfloat16_on_the_gpu(name: str) -> None:
    logits, seeds, counters, seen, suppressed = rows(64, 151_936)
    masks = {"seen": seen, "suppressed": suppressed}
    expected, actual = (
        draw(logits.bfloat16(), SETTINGS[name], seeds, counters, backend, **masks) for backend in BACKENDS
    )
    # A draw on which two scores are equal up to rounding, or a token at the edge of a truncation, may differ.
    same = expected.tokens == actual.tokens
    assert same.float().mean() >= 0.95
    torch.testing.assert_close(actual.logprobs[same], expected.logprobs[same], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Backend) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    output = draw(torch.zeros(0, 50, device=DEVICE), SampleParams(), none, none, backend)
    assert [x.shape for x in output] == [(0,)] * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
    ],
)
def test_params_that_cannot_work_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value}"):
        SampleParams(**{field: value})


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    logits, seeds, counters, seen, suppressed = rows(3, 20)
    with pytest.raises(ValueError, match=r"seeds \[2\]"):
        draw(logits, SampleParams(), seeds[:2], counters)
    with pytest.raises(ValueError, match="seen"):
        draw(logits, SampleParams(), seeds, counters, seen=seen[:, :5])
    with pytest.raises(ValueError, match="suppressed"):
        draw(logits, SampleParams(), seeds, counters, suppressed=suppressed[:5])
    with pytest.raises(ValueError, match="float64"):
        draw(logits.double(), SampleParams(), seeds, counters, "triton")


def test_a_fake_cuda_tensor_takes_the_triton_branch_without_reading_values() -> None:
    with FakeTensorMode():
        logits = torch.empty(3, 500, device="cuda", dtype=torch.bfloat16)
        seeds = torch.empty(3, dtype=torch.int64, device="cuda")
        output = draw(logits, SETTINGS["all"], seeds, seeds, seen=torch.empty(3, 500, dtype=torch.bool, device="cuda"))
        assert [(x.shape, x.dtype) for x in output] == [((3,), d) for d in (torch.int64, torch.float32, torch.float32)]
