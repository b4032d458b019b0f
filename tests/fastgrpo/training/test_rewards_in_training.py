"""Rewards on their way into advantages and logs."""

from typing import Any

import pytest
import torch
from run_files import completions_of, metrics_of, token_sum


def abstaining(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A value for every other completion."""
    return [None if i % 2 else float(len(ids)) for i, ids in enumerate(completion_ids)]


def test_reward_weights(build: Any) -> None:
    trainer = build([token_sum, "length"], reward_weights=[0.7, -20.0], max_steps=2)
    trainer.train()
    for number, step in enumerate(metrics_of(trainer.args.output_dir), start=1):
        parts = [step[f"rewards/{name}/mean"] for name in ("token_sum", "token_length")]
        assert step["reward"] == pytest.approx(0.7 * parts[0] - 20.0 * parts[1], abs=1e-5)
        for row in completions_of(trainer.args.output_dir, number):
            assert row["reward"] == pytest.approx(
                0.7 * row["rewards/token_sum"] - 20.0 * row["rewards/token_length"], abs=1e-5
            )


def test_advantages_compare_a_completion_with_its_group(build: Any) -> None:
    trainer = build(max_steps=1)
    trainer.train()
    rows = completions_of(trainer.args.output_dir, 1)
    for group in (rows[:4], rows[4:]):
        rewards = torch.tensor([row["rewards/token_sum"] for row in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert [row["advantage"] for row in group] == pytest.approx(expected.tolist(), abs=1e-5)
        assert expected.abs().max() > 0.5


def test_a_reward_function_may_abstain(build: Any) -> None:
    trainer = build([token_sum, abstaining], max_steps=1)
    trainer.train()
    rows, (step,) = completions_of(trainer.args.output_dir, 1), metrics_of(trainer.args.output_dir)
    assert [row["rewards/abstaining"] is None for row in rows] == [False, True] * 4
    lengths = [row["length"] for row in rows if row["rewards/abstaining"] is not None]
    assert step["rewards/abstaining/mean"] == pytest.approx(sum(lengths) / 4)
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards/token_sum"] + (row["rewards/abstaining"] or 0.0))


def test_a_reward_function_sees_the_run(build: Any) -> None:
    seen: list[dict[str, Any]] = []

    def curious(**arguments: Any) -> list[float]:
        arguments["log_metric"]("custom/count", torch.tensor(3))
        seen.append(arguments | {"global_step": arguments["trainer_state"].global_step})
        return [0.0] * len(arguments["completions"])

    trainer = build(curious)
    trainer.train()
    assert [arguments["global_step"] for arguments in seen] == [0, 1]
    for arguments in seen:
        assert {len(arguments[name]) for name in ("prompts", "completion_ids", "solution", "choices", "task")} == {8}
        assert arguments["solution"][0] in arguments["choices"][0]
        assert arguments["prompts"][0] == arguments["prompts"][3] != arguments["prompts"][4]
    assert [step["custom/count"] for step in metrics_of(trainer.args.output_dir)] == [3.0, 3.0]
