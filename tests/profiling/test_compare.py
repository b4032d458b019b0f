"""Turns, medians and the protocol between two processes; the workers here are a few lines each."""

import io
import json
import sys

import pytest
from fastgrpo_profiling import span
from fastgrpo_profiling.compare import Spread, StepRecord, alternate, median_phases, paired_ratio, unattributed_share
from fastgrpo_profiling.phases import (
    PARTS,
    PHASE_OF,
    PHASES,
    UNATTRIBUTED,
    in_step_order,
    part_shares,
    phase_seconds,
)
from fastgrpo_profiling.roofline import StepWork
from fastgrpo_profiling.worker import TurnTaker, WorkerError, WorkerSide

WORKER = """
import sys, json, torch
matrix = torch.ones(8, 8)
from fastgrpo_profiling import span
from fastgrpo_profiling.roofline import StepWork
from fastgrpo_profiling.worker import TurnTaker, claim_stdout
turns = TurnTaker(sys.stdin, claim_stdout(), "cpu")
turns.introduce(held_bytes=1)
print("this goes to standard error")
while True:
    turns.next_step()
    with span("reward"):
        matrix @ matrix
    turns.note(tokens=5, reward=0.5, work=StepWork([3], [4], [[5]]), trained=StepWork([], [], []))
    turns.note(tokens=2, reward=0.5, work=StepWork([1], [], [[2]]), trained=StepWork([], [], []))
"""


class Scripted:
    """A side whose steps take what the test says."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, iter(seconds), log

    def step(self, trace: bool) -> StepRecord:
        self.log.append(self.name + " traced" * trace)
        return StepRecord(next(self.seconds), tokens=10, reward=0.0, peak_bytes=0)


def test_sides_take_turns_and_the_first_changes():
    log: list[str] = []
    heard: list[tuple[str, int]] = []
    pair = [Scripted("a", [9, 1, 2, 3, 9], log), Scripted("b", [9, 4, 6, 12, 9], log)]
    found = alternate(pair, warmup=1, steps=3, progress=lambda side, index, step: heard.append((side, index)))
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b", "a traced", "b traced"]
    assert heard == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [step.seconds for step in found.steps["a"]] == [1, 2, 3]
    assert paired_ratio(found.steps["b"], found.steps["a"]) == Spread(4, 3, 4)


def test_time_is_attributed_to_leaves_and_the_rest_is_shown():
    own = {"reward": 1.0, "rollout/decode": 2.0, "rollout/sample": 1.0, "data": 0.5, "rollout": 0.25, "step": 0.25}
    found = {"data": 0.5, "decode": 2.0, "sampling": 1.0, "rewards": 1.0, UNATTRIBUTED: 0.5}
    assert phase_seconds(own, 5.0) == found
    steps = [StepRecord(5.0, 1, 0.0, 0, own), StepRecord(10.0, 1, 0.0, 0, {"reward": 9.0})]
    assert unattributed_share(steps) == 0.1
    assert median_phases(steps) == phase_seconds(own, 5.0)
    assert median_phases([*steps, steps[1]]) == {"rewards": 9.0, UNATTRIBUTED: 1.0}


def test_a_leaf_has_one_phase():
    names = [name for phase in PHASES for name in phase.spans]
    assert len(names) == len(set(names)) == len(PHASE_OF)
    assert in_step_order([UNATTRIBUTED, "decode", "data"]) == ["data", "decode", UNATTRIBUTED]


def test_a_step_is_told_in_parts_that_add_up():
    own = {"rollout/decode": 3.0, "rollout/vision": 1.0, "update/clip": 0.5, "reward": 0.5, "data": 1.0, "rollout": 2.0}
    shares = part_shares(own, 10.0)
    assert shares == {"rollout": 0.4, "reward": 0.05, "update": 0.05, "other": pytest.approx(0.5)}
    assert set().union(*PARTS.values()) <= {phase.name for phase in PHASES}


@pytest.fixture
def worker():
    side = WorkerSide("scripted", [sys.executable, "-c", WORKER])
    yield side
    side.close()


def test_a_worker_answers_each_turn(worker):
    assert worker.ready() == {"held_bytes": 1}
    plain, traced = worker.step(False), worker.step(True)
    assert (plain.tokens, plain.reward, plain.work) == (7, 0.5, StepWork([3, 1], [4], [[5], [2]]))
    assert plain.trained == StepWork([], [], [])
    assert set(plain.own_seconds) == {"step", "reward"}
    assert plain.events == []
    assert [event.name for event in traced.events] == ["reward", "step"]
    assert traced.events[0].held_bytes > 0
    assert plain.peak_bytes > 0


def test_a_worker_looks_inside_a_span(worker):
    worker.ready()
    found = worker.step_inside("reward", every=1)
    assert found.inside["matrix products"] > 0
    assert worker.step(False).inside == {}


def test_a_worker_that_dies_says_why():
    side = WorkerSide("broken", [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(WorkerError, match="broken side ended early:\nno such model"):
        side.step(False)
    side.close()


def test_what_a_step_drew_is_not_told_again_by_a_step_without_a_rollout():
    answers = io.StringIO()
    turns = TurnTaker(io.StringIO('{"trace": false}\n' * 2), answers, "cpu")
    turns.next_step()
    turns.note(tokens=7, reward=1.0)
    turns.next_step()
    with span("update/forward"):
        pass
    with pytest.raises(SystemExit):
        turns.next_step()
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert (first["tokens"], second["tokens"]) == (7, 0)
