"""`grpo_loss` against the formulas written out per sequence in float64."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from fastgrpo_kernels import LossMetrics, LossParams, Surrogate, grpo_loss
from torch import Tensor

LENGTHS = [5, 0, 1, 9, 3]
VARIANTS = {
    "clipped": LossParams(),
    "clipped, asymmetric": LossParams(epsilon_low=0.1, epsilon_high=0.3),
    "clipped, two-sided": LossParams(delta=1.5),
    "clipped, KL": LossParams(beta=0.04),
    "clipped, corrected KL": LossParams(beta=0.04, kl_bias_correction=True),
    "cispo": LossParams(surrogate="cispo", epsilon_high=1.1),
    "sapo": LossParams(surrogate="sapo"),
    "reinforce": LossParams(surrogate="reinforce", beta=0.1, kl_bias_correction=True),
    "sequence": LossParams(level="sequence", epsilon_low=0.05, epsilon_high=0.08),
    "sequence, two-sided, corrected KL": LossParams(
        level="sequence", delta=1.25, beta=0.1, kl_bias_correction=True, epsilon_low=0.05, epsilon_high=0.1
    ),
    "sequence, cispo": LossParams(surrogate="cispo", level="sequence", epsilon_high=1.02),
    "sequence, sapo": LossParams(surrogate="sapo", level="sequence", beta=0.1),
}


def batch(lengths: list[int] = LENGTHS, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def random(count: int = total) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)

    old = -random().abs() - 0.5
    return {
        "logprobs": (old + 0.4 * random()).requires_grad_(),
        "advantages": random(len(lengths)),
        "weights": random().abs() / 10,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "old_logprobs": old,
        "ref_logprobs": old + 0.5 * random(),
        "mask": torch.rand(total, generator=generator) < 0.8,
        "policy_scale": random().abs(),
        "entropy": random().abs().requires_grad_(),
        "entropy_weights": random().abs() / 100,
    }


def truth(params: LossParams, data: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics from loops over sequences and their counted tokens."""
    loss = torch.zeros((), dtype=torch.float64)
    kls, entropies, ratios, lows, highs, low_shares, high_shares = [], [], [], [], [], [], []
    offsets = data["cu_seqlens"].tolist()
    for s, (start, end) in enumerate(pairwise(offsets)):
        tokens = [t for t in range(start, end) if data["mask"][t]]
        if not tokens:
            continue
        advantage = data["advantages"][s].item()
        logs = [data["logprobs"][t] - data["old_logprobs"][t] for t in tokens]
        if params.level == "sequence":
            logs = [sum(logs) / len(logs)] * len(logs)
        flags_low, flags_high = [], []
        for t, log_ratio in zip(tokens, logs, strict=True):
            ratio = log_ratio.exp()
            surrogate, low, high = token_surrogate(params, ratio, advantage, data["logprobs"][t])
            d = data["ref_logprobs"][t] - data["logprobs"][t]
            kl = (d.exp() - d - 1) * (ratio if params.kl_bias_correction else 1)
            loss = loss + data["weights"][t] * (data["policy_scale"][t] * surrogate + params.beta * kl)
            loss = loss - data["entropy_weights"][t] * data["entropy"][t]
            kls.append(kl.item())
            entropies.append(data["entropy"][t].item())
            flags_low.append(low)
            flags_high.append(high)
            if params.level == "token" or t == tokens[0]:
                ratios.append(ratio.item())
                lows.append(low)
                highs.append(high)
        low_shares.append(sum(flags_low) / len(tokens))
        high_shares.append(sum(flags_high) / len(tokens))
    return loss, {
        "token_count": len(kls),
        "kl_sum": sum(kls),
        "entropy_sum": sum(entropies),
        "clip_count": len(ratios),
        "clip_low_sum": sum(lows),
        "clip_high_sum": sum(highs),
        "clip_region_sum": sum(lows) + sum(highs),
        "clip_low_seq_min": min(low_shares),
        "clip_high_seq_max": max(high_shares),
    }


def constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def token_surrogate(params: LossParams, ratio: Tensor, advantage: float, logprob: Tensor) -> tuple[Tensor, bool, bool]:
    """One token's surrogate by cases of the advantage's sign, and whether it is clipped from below, from above."""
    value = ratio.item()
    if params.surrogate == "cispo":
        return (
            -min(value, params.epsilon_high) * advantage * logprob,
            False,
            value > params.epsilon_high and advantage > 0,
        )
    if params.surrogate == "reinforce":
        return -advantage * logprob, False, False
    if params.surrogate == "sapo":
        tau = params.sapo_temperature_pos if advantage > 0 else params.sapo_temperature_neg
        return -advantage * 4 / (tau * (1 + (-tau * (ratio - 1)).exp())), False, False
    low, high = 1 - params.epsilon_low, 1 + params.epsilon_high
    bounded = ratio if params.delta is None or value <= params.delta else constant(params.delta)
    if advantage >= 0:
        return (
            -advantage * (bounded if bounded.item() <= high else constant(high)),
            False,
            (bounded.item() > high and advantage > 0),
        )
    return -advantage * (bounded if bounded.item() >= low else constant(low)), bounded.item() < low, False


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [63], [200, 57]], ids=str)
def test_loss_gradients_and_metrics_match_the_formula(params: LossParams, lengths: list[int]) -> None:
    data, exact = batch(lengths), batch(lengths)
    if lengths == [1]:
        data["mask"] = exact["mask"] = torch.tensor([True])
    output = grpo_loss(params=params, **data)
    expected, metrics = truth(params, exact)
    torch.testing.assert_close(output.loss, expected, atol=1e-12, rtol=1e-9)
    output.loss.backward()
    expected.backward()
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(
            data[name].grad, exact[name].grad, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}.grad: {m}"
        )
    for name, value in output.metrics._asdict().items():
        assert value.item() == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name
        assert not value.requires_grad


def test_the_variants_do_clip() -> None:
    metrics = grpo_loss(params=LossParams(), **batch([200, 57])).metrics
    assert metrics.clip_low_sum > 0
    assert metrics.clip_high_sum > 0


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradcheck(params: LossParams) -> None:
    data = batch([4, 0, 6], seed=3)
    fixed = {name: value for name, value in data.items() if name not in ("logprobs", "entropy")}
    assert_away_from_kinks(params, data)
    if params.surrogate == "cispo":  # its stopped gradient is not the derivative of its value
        fixed["old_logprobs"] = data["logprobs"].detach() - 5  # every ratio above the bound: constant
    assert torch.autograd.gradcheck(
        lambda logprobs, entropy: grpo_loss(logprobs, params=params, entropy=entropy, **fixed).loss,
        (data["logprobs"], data["entropy"]),
    )


def assert_away_from_kinks(params: LossParams, data: dict[str, Any]) -> None:
    ratio = (data["logprobs"] - data["old_logprobs"]).exp()
    kinks = [1 - params.epsilon_low, 1 + params.epsilon_high, params.delta or 1e9]
    assert all((ratio - kink).abs().min() > 1e-4 for kink in kinks)


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
def test_half_and_single_precision_agree_with_float64(params: LossParams) -> None:
    exact = grpo_loss(params=params, **batch()).loss
    single = grpo_loss(params=params, **batch(dtype=torch.float32)).loss
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-5, rtol=1e-5)
    half = grpo_loss(params=params, **batch(dtype=torch.bfloat16)).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_loss_does_not_depend_on_micro_batches(params: LossParams) -> None:
    data = batch()
    whole = grpo_loss(params=params, **data)
    loss, counts, gradient = 0.0, 0.0, torch.zeros(sum(LENGTHS), dtype=torch.float64)
    for first, last in ((0, 2), (2, 3), (3, 5)):
        start, end = data["cu_seqlens"][first], data["cu_seqlens"][last]
        part = {n: v[start:end] for n, v in data.items() if n not in ("advantages", "cu_seqlens")}
        part["logprobs"] = part["logprobs"].detach().requires_grad_()
        offsets = data["cu_seqlens"][first : last + 1] - start
        output = grpo_loss(advantages=data["advantages"][first:last], cu_seqlens=offsets, params=params, **part)
        output.loss.backward()
        loss, counts = loss + output.loss, counts + output.metrics.clip_count
        gradient[start:end] = part["logprobs"].grad
    whole.loss.backward()
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradient, data["logprobs"].grad)
    assert counts == whole.metrics.clip_count


@pytest.mark.parametrize("surrogate", ["clipped", "cispo", "sapo", "reinforce"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_descent_step_raises_good_tokens_and_lowers_bad_ones(surrogate: Any, level: Any, advantage: float) -> None:
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    params = LossParams(surrogate=surrogate, level=level, epsilon_high=2.0 if surrogate == "cispo" else 0.2)
    grpo_loss(logprobs, torch.tensor([advantage]), torch.ones(3), torch.tensor([0, 3]), params).loss.backward()
    assert (-logprobs.grad * advantage > 0).all()


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    data = batch()
    del data["old_logprobs"], data["policy_scale"], data["mask"], data["entropy_weights"]
    output = grpo_loss(params=LossParams(), **data)
    output.loss.backward()
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    torch.testing.assert_close(data["logprobs"].grad, -data["advantages"][owner] * data["weights"])
    assert output.metrics.clip_region_sum == 0


def test_kl_pulls_towards_the_reference() -> None:
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    reference = torch.tensor([-2.0, -2.0])
    params = LossParams(beta=1.0)
    output = grpo_loss(logprobs, torch.zeros(1), torch.ones(2), torch.tensor([0, 2]), params, ref_logprobs=reference)
    output.loss.backward()
    assert logprobs.grad[0] > 0 > logprobs.grad[1]
    assert output.metrics.kl_sum.item() == pytest.approx((math.exp(-1) + 1 - 1) + (math.e - 1 - 1), rel=1e-6)


def test_kl_is_measured_without_entering_the_loss_at_beta_zero() -> None:
    data = batch()
    with_reference = grpo_loss(params=LossParams(), **data)
    without = grpo_loss(params=LossParams(), **{**data, "ref_logprobs": None})
    assert with_reference.loss == without.loss
    assert with_reference.metrics.kl_sum > 0
    assert without.metrics.kl_sum == 0


def test_the_policy_scale_spares_the_kl() -> None:
    data = batch()
    data["policy_scale"] = torch.zeros_like(data["weights"])
    params = LossParams(beta=0.5)
    kl_only = grpo_loss(params=params, **{**data, "advantages": torch.zeros_like(data["advantages"])}).loss
    assert grpo_loss(params=params, **data).loss == kl_only


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything(params: LossParams, poison: float) -> None:
    clean, poisoned = batch(dtype=torch.float32), batch(dtype=torch.float32)
    hidden = ~clean["mask"]
    for name in ("logprobs", "entropy"):
        poisoned[name] = poisoned[name].detach().masked_fill(hidden, poison).requires_grad_()
    for name in ("old_logprobs", "ref_logprobs", "weights", "policy_scale", "entropy_weights"):
        poisoned[name] = poisoned[name].masked_fill(hidden, poison)
    expected, actual = grpo_loss(params=params, **clean), grpo_loss(params=params, **poisoned)
    assert actual.loss == expected.loss
    assert actual.metrics == expected.metrics
    expected.loss.backward()
    actual.loss.backward()
    for name in ("logprobs", "entropy"):
        assert torch.equal(poisoned[name].grad, clean[name].grad), name
        assert (poisoned[name].grad[hidden] == 0).all(), name


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [4, 2]], ids=str)
def test_nothing_counted_gives_zero_loss_and_gradient(params: LossParams, lengths: list[int]) -> None:
    data = batch(lengths)
    data["mask"] = torch.zeros(sum(lengths), dtype=torch.bool)
    output = grpo_loss(params=params, **data)
    assert output.loss == 0
    output.loss.backward()
    assert (data["logprobs"].grad == 0).all()
    assert output.metrics.token_count == output.metrics.clip_count == 0
    assert output.metrics.clip_low_seq_min == math.inf
    assert output.metrics.clip_high_seq_max == -math.inf


@pytest.mark.parametrize("gap", [1e3, -1e3, 25.0, 4.0])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_huge_kl_stays_finite_and_is_constant_beyond_its_cap(gap: float, corrected: bool) -> None:
    logprobs = torch.tensor([-2.0], requires_grad=True)
    params = LossParams(beta=0.1, kl_bias_correction=corrected)
    output = grpo_loss(
        logprobs, torch.zeros(1), torch.ones(1), torch.tensor([0, 1]), params, ref_logprobs=logprobs.detach() + gap
    )
    output.loss.backward()
    assert output.loss.isfinite()
    assert logprobs.grad.isfinite().all()
    capped = min(max(gap, -20), 20)
    value = math.exp(capped) - capped - 1
    slope = 0.0 if abs(gap) > 20 else 1 - math.exp(gap)
    expected = 0.1 * (slope + (value if corrected else 0))
    assert logprobs.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("gap", [1e3, -1e3, 88.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_huge_ratio_stays_finite(params: LossParams, gap: float, advantage: float) -> None:
    logprobs = torch.tensor([-2.0, -1.0], requires_grad=True)
    old = logprobs.detach() - gap
    output = grpo_loss(
        logprobs,
        torch.tensor([advantage]),
        torch.ones(2),
        torch.tensor([0, 2]),
        params,
        old_logprobs=old,
        ref_logprobs=old,
    )
    output.loss.backward()
    assert output.loss.isfinite()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("params", [LossParams(surrogate=name) for name in get_args(Surrogate)])
def test_zero_advantages_teach_nothing(params: LossParams) -> None:
    data = batch()
    del data["entropy_weights"]
    output = grpo_loss(params=params, **{**data, "advantages": torch.zeros_like(data["advantages"])})
    output.loss.backward()
    assert output.loss == 0
    assert (data["logprobs"].grad == 0).all()


def test_the_entropy_bonus_raises_entropy() -> None:
    entropy = torch.tensor([0.5, 1.5], requires_grad=True)
    output = grpo_loss(
        torch.tensor([-1.0, -1.0]),
        torch.zeros(1),
        torch.ones(2),
        torch.tensor([0, 2]),
        LossParams(),
        entropy=entropy,
        entropy_weights=torch.tensor([0.1, 0.2]),
    )
    assert output.loss.item() == pytest.approx(-0.35)
    output.loss.backward()
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.1, -0.2]))
    assert output.metrics.entropy_sum == 2


def test_metrics_are_scalars_that_add_up_over_micro_batches() -> None:
    data = batch()
    metrics = grpo_loss(params=LossParams(beta=0.1), **data).metrics
    assert isinstance(metrics, LossMetrics)
    assert all(value.shape == () for value in metrics)


BAD_PARAMS = [
    ("surrogate", "ppo"),
    ("level", "batch"),
    ("epsilon_low", -0.1),
    ("epsilon_high", math.nan),
    ("beta", -1.0),
    ("beta", math.inf),
    ("delta", 0.0),
    ("sapo_temperature_pos", 0.0),
    ("sapo_temperature_neg", -1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMS)
def test_params_that_cannot_work_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*use "):
        replace(LossParams(), **{name: value})


def test_arguments_that_do_not_fit_are_refused() -> None:
    data = batch()
    for name in ("weights", "old_logprobs", "ref_logprobs", "mask", "policy_scale", "entropy", "entropy_weights"):
        with pytest.raises(ValueError, match=name):
            grpo_loss(params=LossParams(), **{**data, name: data[name][:-1]})
    with pytest.raises(ValueError, match="cu_seqlens"):
        grpo_loss(params=LossParams(), **{**data, "cu_seqlens": data["cu_seqlens"][:-1]})
    with pytest.raises(ValueError, match=r"cu_seqlens ends at 17"):
        grpo_loss(params=LossParams(), **{**data, "cu_seqlens": (data["cu_seqlens"] - 1).clamp(min=0)})
    with pytest.raises(ValueError, match=r"beta=0\.1 needs ref_logprobs"):
        grpo_loss(params=LossParams(beta=0.1), **{**data, "ref_logprobs": None})
    with pytest.raises(ValueError, match="entropy_weights needs entropy"):
        grpo_loss(params=LossParams(), **{**data, "entropy": None})
