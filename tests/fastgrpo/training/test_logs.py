"""What a run writes down."""

from pathlib import Path
from typing import Any

import pytest
from run_files import completions_of, metrics_of, token_sum

METRICS = {
    "num_tokens", "step_time", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length",
    "completions/clipped_ratio", "rewards/token_sum/mean", "rewards/token_sum/std", "reward", "reward_std",
    "frac_reward_zero_std", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean",
    "clip_ratio/high_max", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/max", "loss", "grad_norm",
    "learning_rate", "epoch", "tokens_per_second", "reflection_rate", "reflections_per_1k_tokens",
    "self_correction/wrong_to_right", "self_correction/right_to_wrong", "skipped_rows", "time/rollout", "time/reward",
    "step",
}  # fmt: skip


def test_metrics_have_trls_names(build: Any) -> None:
    trainer = build(beta=0.04)
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    logged = trainer.state.log_history
    for number, step in enumerate(steps, start=1):
        assert not METRICS - set(step)
        assert step["step"] == number
        rows = completions_of(trainer.args.output_dir, number)
        assert step["completions/mean_length"] == pytest.approx(sum(row["length"] for row in rows) / 8)
        assert step["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 8)
        # Drawn from the policy that is updated; only image tokens are kept out.
        assert step["sampling/sampling_logp_difference/max"] < 0.05
        assert {name: logged[number - 1][name] for name in METRICS} == {name: step[name] for name in METRICS}
    assert steps[1]["num_tokens"] > steps[0]["num_tokens"] > 8 * 20
    assert steps[0]["kl"] < 1e-9 < steps[1]["kl"], "nothing had moved at the first"


def test_log_lines_are_means_over_their_steps(build: Any) -> None:
    trainer = build(max_steps=5, logging_steps=2)
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    lines = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    assert sorted(lines) == [2, 4]
    for end, line in lines.items():
        for name in ("loss", "reward", "grad_norm", "entropy"):
            assert line[name] == pytest.approx((steps[end - 2][name] + steps[end - 1][name]) / 2)


def test_the_completions_log(build: Any) -> None:
    trainer = build([token_sum, "accuracy"], max_steps=2)
    trainer.train()
    for step in (1, 2):
        rows = completions_of(trainer.args.output_dir, step)
        assert list(rows[0]) == [
            "step", "row_id", "index", "prompt", "completion", "finish_reason", "length", "advantage", "reward",
            "rewards/token_sum", "rewards/tagged_accuracy", "correction", "task", "solution", "thumbnail",
        ]  # fmt: skip
        assert [row["step"] for row in rows] == [step] * 8
        assert [row["index"] for row in rows] == [0, 1, 2, 3] * 2
        assert [row["row_id"] for row in rows] == [rows[0]["row_id"]] * 4 + [rows[4]["row_id"]] * 4
        assert [row["thumbnail"] is not None for row in rows] == [True, False, False, False] * 2
        assert rows[0]["thumbnail"].startswith(b"\xff\xd8")
        assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
        assert all(1 <= row["length"] <= 6 for row in rows)


def test_logs_can_be_left_out(build: Any) -> None:
    trainer = build(log_completions=False, max_steps=1)
    trainer.train()
    assert not (Path(trainer.args.output_dir) / "completions").exists()


def test_an_earlier_runs_logs_are_kept_apart(build: Any) -> None:
    for _ in range(2):
        trainer = build(max_steps=2)
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert [step["step"] for step in metrics_of(folder)] == [1, 2]
    assert [step["step"] for step in metrics_of(folder / "previous-1")] == [1, 2]
    assert completions_of(folder, 1) == completions_of(folder / "previous-1", 1)


def test_training_twice_in_one_process(build: Any) -> None:
    trainer = build(num_iterations=2, max_steps=3)
    trainer.train()
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    assert ["reward" in step for step in steps] == [True, False, True], "nothing is left of the first time's rollout"


def test_names_of_rewards_overwrite_nothing(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    def length(completion_ids: list[list[int]], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("reward", [str(ids[0]) for ids in completion_ids])
        for name in ("reward", "step", "mine"):
            log_metric(name, -7.0)
        return [100.0 + i % 3 for i in range(len(completion_ids))]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-1.0] * len(completion_ids)

    trainer = build([length, reward, reward])
    trainer.train()
    for number, step in enumerate(metrics_of(trainer.args.output_dir), start=1):
        rows = completions_of(trainer.args.output_dir, number)
        assert (step["step"], step["custom/step"], step["custom/reward"], step["mine"]) == (number, -7.0, -7.0, -7.0)
        assert step["reward"] == pytest.approx(step["rewards/length/mean"] - 2)
        assert step["rewards/reward/mean"] == step["rewards/reward_2/mean"] == -1.0
        assert all(1 <= row["length"] <= 6 for row in rows), "tokens"
        assert [row["reward"] for row in rows] == pytest.approx([row["rewards/length"] - 2 for row in rows])
        assert all(row["extra/reward"].isdigit() for row in rows)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("fastgrpo")]
    assert sum("are called reward: they are logged as" in message for message in told) == 1
    assert sum("log_metric('reward', …): a metric of ours has that name" in message for message in told) == 1
