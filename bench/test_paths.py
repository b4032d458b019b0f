"""Rollout and update against plain transformers as a pytest-benchmark suite. `make bench`.

The models, inputs and sides of `bench_sampler.py` and `bench_update.py`, at one small workload each.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bench_sampler
import bench_update
import gate
import pytest
import torch
from sides.rollout import build_engine, hf_rollout, our_rollout
from workloads import RAGGED, SMALL, build_groups, build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROLLOUT = replace(SMALL.of(24), prompts=4, text_tokens=(70, 64, 76, 70))
UPDATE = replace(SMALL, lengths=RAGGED)


@pytest.fixture(scope="module")
def rollouts() -> dict[str, Callable[[], Any]]:
    """Both sides, after our log-probs were found right."""
    model = build_model(ROLLOUT.model, DEVICE)
    engine = build_engine(model)
    assert bench_sampler.are_right(bench_sampler.logprob_errors(model, engine, ROLLOUT))
    return {
        gate.OURS: partial(our_rollout, engine, ROLLOUT, ROLLOUT.new_tokens),
        gate.REFERENCE: partial(hf_rollout, model, ROLLOUT, ROLLOUT.new_tokens),
    }


@pytest.fixture(scope="module")
def updates() -> dict[str, Callable[[], Any]]:
    """Both sides, after their gradients were found equal."""
    model, groups = build_model(UPDATE.model, DEVICE).train(), build_groups(UPDATE)
    sides = bench_update.updaters(model, DEVICE)
    if DEVICE == "cpu":
        _, ours = bench_update.gradients_of(model, sides["packed"], groups)
        _, theirs = bench_update.gradients_of(model, sides["naive"], groups)
        assert bench_update.max_relative_error(ours, theirs) <= bench_update.TOLERANCES["cpu"].gradient
    roles = {gate.OURS: sides["packed"], gate.REFERENCE: sides["naive"]}
    return {role: partial(bench_update.step, model, updater, groups) for role, updater in roles.items()}


@pytest.mark.benchmark(group="rollout", timer=gate.TIMER)
@pytest.mark.parametrize("role", [gate.OURS, gate.REFERENCE])
def test_rollout(timed: Callable[..., None], rollouts: dict[str, Callable[[], Any]], role: str) -> None:
    timed(role, rollouts[role], rounds=8)


@pytest.mark.benchmark(group="update", timer=gate.TIMER)
@pytest.mark.parametrize("role", [gate.OURS, gate.REFERENCE])
def test_update(timed: Callable[..., None], updates: dict[str, Callable[[], Any]], role: str) -> None:
    timed(role, updates[role], rounds=8)
