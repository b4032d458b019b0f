"""Reward functions that users write."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., tuple[int, list[str]]]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "reward function 'nan' returned nan for completion 1 of row "),
        ("short", "reward function 'short' returned 1 rewards for 4 completions"),
        ("raising", "reward function 'raising' failed on 4 completions: KeyError: 'no such\\nkey'"),
        ("words", "reward function 'words' returned 'good' for completion 0 of row "),
        ("absent", "'odd_rewards:absent' cannot be imported"),
        ("number", "'odd_rewards:number' is a int, not a function"),
    ],
)
def test_reward_functions_gone_wrong(refused: Callable[..., str], rewards: str, name: str, message: str) -> None:
    assert message in refused("--reward_funcs", f"{rewards}:{name}")


@pytest.mark.parametrize("spec", ["my_rewards:right", "my_rewards.right"])
def test_rewards_of_a_file_in_the_current_folder(
    train: Train, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    folder = tmp_path / spec.replace(":", "_")
    folder.mkdir()
    (folder / "my_rewards.py").write_text("def right(completions, **_): return [1.0] * len(completions)\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", ".")])  # as of a script in bin/
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    code, lines = train("--reward_funcs", spec)
    assert code == 0, lines
    assert metrics(out)[0]["rewards/right/mean"] == 1.0


def test_a_module_of_rewards_that_does_not_compile(refused: Callable[..., str], rewards: str) -> None:
    assert "'broken_rewards:right' cannot be imported: SyntaxError" in refused("--reward_funcs", "broken_rewards:right")
