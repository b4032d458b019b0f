"""The Triton `grpo_loss` against the reference and against float64; under the interpreter where there is no GPU."""

import math
import random
from itertools import combinations, product
from typing import Any, get_args

import pytest
import torch
from fastgrpo_kernels import LossOutput, LossParams, Surrogate, grpo_loss, reference
from fastgrpo_kernels.types import Level
from rounding import assert_within, of_terms, unit
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONAL = ("old_logprobs", "ref_logprobs", "mask", "policy_scale", "entropy", "entropy_weights")
AXES: dict[str, list[Any]] = {
    "surrogate": list(get_args(Surrogate)),
    "level": ["token", "sequence"],
    "epsilon_high": [0.05, 0.3, 1.1],
    "delta": [None, 1.02, 1.5],
    "beta": [0.0, 0.1],
    "kl_bias_correction": [False, True],
    "sapo_temperature_neg": [1.05, 0.5],
    "lengths": [[1], [63], [257], [5, 0, 1, 9, 3], [1030, 2]],
    **{name: [True, False] for name in OPTIONAL},
}


CHANCE = random.Random(0)
CASES = [{name: CHANCE.choice(values) for name, values in AXES.items()} for _ in range(110)]
VARIANTS = [
    LossParams(surrogate, level, epsilon_high=1.05 if surrogate == "cispo" else 0.1, beta=0.1, kl_bias_correction=True)
    for surrogate, level in product(get_args(Surrogate), get_args(Level))
]
each_variant = pytest.mark.parametrize("params", VARIANTS, ids=lambda params: f"{params.surrogate}-{params.level}")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter mis-computes bfloat16")],
    ),
]


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Any:
    """`torch.empty` and the like give NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def random_values(count: int = total) -> Tensor:
        return torch.randn(count, generator=generator)

    old = -random_values().abs() - 0.5
    data = {
        "logprobs": old + 0.3 * random_values() + 0.2,
        "advantages": random_values(len(lengths)),
        "weights": random_values().abs() / 10,
        "old_logprobs": old,
        "ref_logprobs": old + 0.5 * random_values(),
        "policy_scale": random_values().abs(),
        "entropy": random_values().abs(),
        "entropy_weights": random_values().abs() / 100,
    }
    data = {name: values.to(dtype) for name, values in data.items()}
    data["mask"] = torch.rand(total, generator=generator) < 0.8
    data["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return {name: values.to(DEVICE) for name, values in data.items()}


def copy(data: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Leaves of its own, in another dtype if asked."""
    copied = {n: v.to(dtype) if dtype and v.is_floating_point() else v.clone() for n, v in data.items()}
    return {n: v.detach().requires_grad_(n in ("logprobs", "entropy")) for n, v in copied.items()}


def triton_loss(**arguments: Any) -> LossOutput:
    return grpo_loss(backend="triton", **arguments)


def results(op: Any, params: LossParams, data: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, gradients and metrics by name, in float64."""
    output = op(params=params, **data)
    output.loss.backward()
    found = {"loss": output.loss.detach(), **output.metrics._asdict(), "logprobs.grad": data["logprobs"].grad}
    if data.get("entropy") is not None and data.get("entropy_weights") is not None:
        found["entropy.grad"] = data["entropy"].grad
    return {name: values.double() for name, values in found.items()}


def rounding_bounds(params: LossParams, data: dict[str, Any]) -> dict[str, Tensor]:
    """How far each result may be off in float32, to first order: sums in any order, a few roundings a token."""
    u, mask, lengths = unit(torch.float32), data.get("mask"), data["cu_seqlens"].diff()
    logprob, count = data["logprobs"].double(), len(data["logprobs"])
    mask = torch.ones(count, dtype=torch.bool, device=DEVICE) if mask is None else mask
    owner = torch.arange(len(lengths), device=DEVICE).repeat_interleave(lengths)

    def given(name: str, otherwise: Tensor) -> Tensor:
        return (data[name].double() if data.get(name) is not None else otherwise) * mask

    def by_sequence(values: Tensor) -> Tensor:
        """Each token gets its sequence's sum."""
        return torch.zeros(len(lengths), dtype=torch.float64, device=DEVICE).index_add_(0, owner, values)[owner]

    logprob, ones = logprob * mask, torch.ones_like(logprob)
    weight, scale, advantage = given("weights", ones), given("policy_scale", ones).abs(), data["advantages"].double()
    advantage = advantage[owner].abs()
    log_ratio = logprob - given("old_logprobs", logprob)
    log_ratio_off = u * log_ratio.abs()
    if params.level == "sequence":
        counted = by_sequence(mask.double()).clamp(min=1)
        mean_size, terms = by_sequence(log_ratio.abs()) / counted, of_terms(count) + 4 * u
        log_ratio, log_ratio_off = by_sequence(log_ratio) / counted, terms * mean_size
    ratio = log_ratio.clamp(-60, 60).exp()
    ratio_off = ratio * (log_ratio_off + 4 * u)
    d = (given("ref_logprobs", logprob) - logprob).clamp(-20, 20)
    kl = d.expm1() - d
    slope, slope_off = d.expm1().abs(), u * (d.abs() * d.exp() + 4 * (d.expm1().abs() + d.abs()))
    kl_off = slope_off * d.abs().clamp(max=1) + 4 * u * (d.expm1().abs() + d.abs())
    if params.kl_bias_correction:
        kl_off, slope_off = kl_off * ratio + kl * ratio_off, slope_off * ratio + slope * ratio_off
        kl, slope = kl * ratio, slope * ratio + kl * ratio

    tau = params.sapo_temperature_pos + params.sapo_temperature_neg
    size = advantage * (ratio + 4)  # at least the surrogate's, and its slope's by the log ratio
    off = advantage * (1 + tau * ratio) * (ratio_off + 8 * u * (ratio + 4))
    if params.surrogate in ("cispo", "reinforce"):
        size, off = size * (1 + logprob.abs()), off * (1 + logprob.abs())
    bounds = (1 - params.epsilon_low, params.epsilon_high, 1 + params.epsilon_high, params.delta or math.inf)
    undecided = sum((ratio - bound).abs() <= 2 * ratio_off for bound in bounds) > 0  # clipped or not
    undecided = (undecided & mask).double()
    off_by_ratio = weight * scale * (off + undecided * size)

    entropy = given("entropy", torch.zeros_like(ones)).abs()
    bonus = given("entropy_weights", torch.zeros_like(ones)).abs()
    total = weight * (scale * size + params.beta * kl) + bonus * entropy
    gradient_off = off_by_ratio + weight * params.beta * (slope_off + kl_off + 8 * u * slope)
    if params.level == "sequence":
        through = weight * (scale * size + params.beta * kl)
        mean_off = by_sequence(off_by_ratio + weight * params.beta * kl_off + (of_terms(count) + 8 * u) * through)
        gradient_off = gradient_off + mean_off / counted
    flags = undecided.sum()
    return {
        "loss": (weight * (scale * off + params.beta * kl_off)).sum() + (of_terms(count) + 8 * u) * total.sum(),
        "logprobs.grad": gradient_off,
        "entropy.grad": 2 * u * bonus,
        "token_count": torch.zeros(()),
        "clip_count": torch.zeros(()),
        "kl_sum": kl_off.sum() + of_terms(count) * kl.sum(),
        "entropy_sum": of_terms(count) * entropy.sum(),
        **{f"clip_{name}_sum": flags + 4 * u * count for name in ("low", "high", "region")},
        **{f"clip_{name}": flags + 4 * u for name in ("low_seq_min", "high_seq_max")},
    }


def check(params: LossParams, data: dict[str, Any]) -> None:
    """Every result is the reference's in float64, up to rounding."""
    exact = results(reference.grpo_loss, params, copy(data, torch.float64))
    actual = results(triton_loss, params, copy(data))
    bounds = rounding_bounds(params, data)
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        assert_within(actual[name], expected, bounds[name], name)


def test_the_cases_pair_every_two_values() -> None:
    for one, other in combinations(AXES, 2):
        met = [(case[one], case[other]) for case in CASES]
        assert all(pair in met for pair in product(AXES[one], AXES[other])), (one, other)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_option_is_the_reference_up_to_rounding(case: dict[str, Any]) -> None:
    options = {n: v for n, v in case.items() if n not in (*OPTIONAL, "lengths")}
    data = batch(case["lengths"])
    needed = {"ref_logprobs"} if case["beta"] else set()
    needed |= {"entropy"} if case["entropy_weights"] else set()
    absent = {name for name in OPTIONAL if not case[name]} - needed
    check(LossParams(**options), {name: values for name, values in data.items() if name not in absent})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_variant
def test_half_precision_is_computed_in_float32(params: LossParams, dtype: torch.dtype) -> None:
    data = batch([70, 3], dtype)
    output = triton_loss(params=params, **copy(data))
    assert output.loss.dtype == torch.float32
    exact = results(reference.grpo_loss, params, copy(data, torch.float64))
    actual = results(triton_loss, params, copy(data))
    for name, expected in exact.items():
        # A gradient comes back in its input's dtype.
        rounding = torch.finfo(dtype).eps if name.endswith("grad") else 0
        torch.testing.assert_close(actual[name], expected, rtol=rounding + 1e-5, atol=2e-6, msg=name)


@each_variant
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [4, 0, 2]], ids=str)
def test_nothing_counted_gives_zero_loss_and_gradient(params: LossParams, lengths: list[int]) -> None:
    data = copy(batch(lengths))
    data["mask"] = torch.zeros(sum(lengths), dtype=torch.bool, device=DEVICE)
    output = triton_loss(params=params, **data)
    output.loss.backward()
    assert output.loss == 0
    assert (data["logprobs"].grad == 0).all()
    assert (data["entropy"].grad == 0).all()
    assert output.metrics.token_count == output.metrics.clip_count == 0
    assert output.metrics.clip_low_seq_min == math.inf
    assert output.metrics.clip_high_seq_max == -math.inf


@each_variant
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything(params: LossParams, poison: float) -> None:
    clean = batch([5, 0, 1, 9, 3])
    clean["mask"][5] = False  # all of the sequence of one token
    poisoned = {
        name: values.masked_fill(~clean["mask"], poison) if name not in ("advantages", "mask", "cu_seqlens") else values
        for name, values in clean.items()
    }
    expected, actual = (results(triton_loss, params, copy(data)) for data in (clean, poisoned))
    for name, values in expected.items():
        assert torch.equal(actual[name], values), name
    assert (actual["logprobs.grad"][~clean["mask"]] == 0).all()


@each_variant
@pytest.mark.parametrize("gap", [1e4, -1e4, 88.0, -61.0, 59.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_huge_ratios_and_kls_stay_finite(params: LossParams, gap: float, advantage: float) -> None:
    data = {
        "logprobs": torch.tensor([-2.0, -1.0], device=DEVICE),
        "advantages": torch.tensor([advantage], device=DEVICE),
        "weights": torch.ones(2, device=DEVICE),
        "cu_seqlens": torch.tensor([0, 2], device=DEVICE),
    }
    data["old_logprobs"] = data["logprobs"] - gap
    data["ref_logprobs"] = data["logprobs"] + gap
    expected = results(reference.grpo_loss, params, copy(data))
    actual = results(triton_loss, params, copy(data))
    for name, values in expected.items():
        assert actual[name].isfinite().all(), name
        torch.testing.assert_close(actual[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_the_kl_of_close_policies_does_not_cancel() -> None:
    reference_logprobs = torch.tensor([-1.0, -2.0, -3.0], device=DEVICE)
    logprobs = reference_logprobs - torch.tensor([1e-3, -4e-3, 0.4], device=DEVICE)
    offsets = torch.tensor([0, 3], device=DEVICE)
    params = LossParams(beta=1.0)
    zero, ones = torch.zeros(1, device=DEVICE), torch.ones(3, device=DEVICE)
    output = grpo_loss(logprobs, zero, ones, offsets, params, ref_logprobs=reference_logprobs, backend="triton")
    d = reference_logprobs.double() - logprobs.double()
    torch.testing.assert_close(output.loss.double(), (torch.expm1(d) - d).sum(), rtol=3e-7, atol=0)


@each_variant
def test_zero_advantages_teach_nothing(params: LossParams) -> None:
    data = copy(batch([5, 3]))
    data["advantages"], data["entropy_weights"] = torch.zeros(2, device=DEVICE), None
    output = triton_loss(params=LossParams(params.surrogate, params.level), **data)
    output.loss.backward()
    assert output.loss == 0
    assert (data["logprobs"].grad == 0).all()


@pytest.mark.parametrize("level", get_args(Level))
def test_many_tokens(level: Level) -> None:
    check(LossParams(level=level, beta=0.1), batch([40_000, 1, 26_000]))


@each_variant
def test_a_sequence_does_not_feel_its_neighbours(params: LossParams) -> None:
    data = batch([40, 7, 0, 11])
    whole = copy(data)
    triton_loss(params=params, **whole).loss.backward()
    offsets = data["cu_seqlens"].tolist()
    for i in range(4):
        start, end = offsets[i], offsets[i + 1]
        alone = copy({n: v[start:end] for n, v in data.items() if n not in ("advantages", "cu_seqlens")})
        alone["advantages"] = data["advantages"][i : i + 1]
        alone["cu_seqlens"] = torch.tensor([0, end - start], device=DEVICE)
        triton_loss(params=params, **alone).loss.backward()
        assert torch.equal(alone["logprobs"].grad, whole["logprobs"].grad[start:end])


def test_the_same_bits_every_time() -> None:
    first, second = (results(triton_loss, VARIANTS[0], copy(batch([300, 20, 7]))) for _ in range(2))
    assert all(torch.equal(second[name], values) for name, values in first.items())
