"""`autopick`: the fastest candidate that is right, measured once, remembered in memory and in a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgrpo_kernels.autopick import VARIABLE, Candidates, Choices, cache_file, device_times, pick
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
SECONDS = {"slow": 3.0, "fast": 1.0, "middling": 2.0}


class Timer:
    """Times that the test gives; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, candidates: Candidates, device: torch.device) -> dict[str, float]:
        self.asked.append(list(candidates))
        return {name: SECONDS[name] for name in candidates}


def returning(*names: str, value: int = 7) -> dict[str, Callable[[], int]]:
    return {name: lambda: value for name in names}


def is_seven(result: Any) -> bool:
    return result == 7


def failing() -> int:
    raise RuntimeError("out of resources")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "choices.json"


def test_the_fastest_right_candidate_is_chosen_and_remembered(file: Path) -> None:
    timer = Timer()
    choices = Choices(file, timer)
    candidates = returning("slow", "middling") | returning("fast", value=8)  # the fastest is wrong
    for _ in range(2):
        assert choices.pick("key", candidates, "slow", is_seven, CPU) == "middling"
    assert timer.asked == [["slow", "middling"]]
    another = Choices(file, timer)
    assert another.pick("key", candidates, "slow", is_seven, CPU) == "middling"
    assert len(timer.asked) == 1
    assert another.pick("other key", returning("slow", "fast"), "slow", is_seven, CPU) == "fast"


def test_a_candidate_that_raises_is_out(file: Path) -> None:
    choices = Choices(file, Timer())
    candidates = {**returning("slow"), "fast": failing}
    assert choices.pick("key", candidates, "fast", is_seven, CPU) == "slow"


def test_where_none_is_right_the_default_is_used_and_said_so(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    candidates = returning("slow", value=8) | {"fast": failing}
    assert Choices(file, Timer()).pick("key", candidates, "slow", is_seven, CPU) == "slow"
    assert "no candidate gives the right result" in caplog.text


def test_nothing_is_measured_where_it_must_not_be_but_what_is_known_counts(file: Path) -> None:
    timer = Timer()
    choices = Choices(file, timer)
    candidates = returning("slow", "fast")
    assert choices.pick("key", candidates, "slow", is_seven, CPU, may_measure=False) == "slow"
    assert timer.asked == []
    assert not file.exists()
    choices.pick("key", candidates, "slow", is_seven, CPU)
    assert choices.pick("key", candidates, "slow", is_seven, CPU, may_measure=False) == "fast"


@pytest.mark.parametrize("content", ["{ not json", "[1, 2]", '{"key": 3}', '{"key": "gone"}'])
def test_a_file_that_says_nothing_useful_is_ignored_and_replaced(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert Choices(file, Timer()).pick("key", returning("slow", "fast"), "slow", is_seven, CPU) == "fast"
    assert json.loads(file.read_text())["key"] == "fast"


def test_choices_of_other_processes_stay_and_no_temporary_file_does(file: Path) -> None:
    first, second = (Choices(file, Timer()) for _ in range(2))
    for choices, key in ((first, "a"), (second, "b"), (first, "c")):
        choices.pick(key, returning("slow", "fast"), "slow", is_seven, CPU)
    assert json.loads(file.read_text()) == dict.fromkeys("abc", "fast")
    assert os.listdir(file.parent) == [file.name]


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    choices = Choices(tmp_path / "cache" / "choices.json", timer := Timer())
    for _ in range(2):
        assert choices.pick("key", returning("slow", "fast"), "slow", is_seven, CPU) == "fast"
    assert len(timer.asked) == 1


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "fastgrpo" / "choices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "fastgrpo" / "choices.json"


def test_off_the_gpu_and_without_data_the_default_is_used() -> None:
    def pick_for(tensor: torch.Tensor) -> str:
        return pick("op", (3,), tensor, {"default": failing, "other": failing}, default="default", agrees=is_seven)

    assert pick_for(torch.zeros(3)) == "default"
    with FakeTensorMode():
        assert pick_for(torch.zeros(3, device="cuda")) == "default"


@pytest.mark.gpu
def test_the_gpus_own_clock_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    choices = Choices(tmp_path / "choices.json", device_times)
    x = torch.randn(1 << 22, device="cuda")
    candidates = {"twenty": lambda: [x.neg() for _ in range(20)][-1], "one": lambda: x.neg()}
    key, device = "neg", torch.device("cuda")
    assert choices.pick(key, candidates, "twenty", lambda y: bool((y == -x).all()), device) == "one"
    monkeypatch.setenv(VARIABLE, "0")
    assert pick("neg", (1,), x, candidates, default="twenty", agrees=lambda y: True) == "twenty"
