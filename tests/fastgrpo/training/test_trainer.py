"""What an update moves, how rollouts feed updates, on one rank and on two."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_files import changed, completions_of, metrics_of, parameters
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]


def constant(completions: list[Any], **_: Any) -> list[float]:
    return [0.5] * len(completions)


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("grpo", 0.04)])
def test_every_parameter_changes(build: Any, loss_type: str, beta: float) -> None:
    trainer = build(loss_type=loss_type, beta=beta, max_steps=3)
    before = parameters(trainer)
    trainer.train()
    assert changed(before, trainer) == set(before)


def test_truncated_completions_can_be_left_out(build: Any) -> None:
    trainer = build(mask_truncated_completions=True, max_completion_length=2, beta=0.04)
    before = parameters(trainer)
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    assert [step["completions/clipped_ratio"] for step in steps] == [1.0, 1.0]
    assert [step["grad_norm"] for step in steps] == [0.0, 0.0]
    assert [step["loss"] for step in steps] == [0.0, 0.0]
    assert steps[1]["learning_rate"] < steps[0]["learning_rate"], "the schedule goes on"
    assert changed(before, trainer) == set()


def test_equal_rewards_teach_nothing(build: Any) -> None:
    trainer = build(constant)
    before = parameters(trainer)
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    assert [step["frac_reward_zero_std"] for step in steps] == [1.0, 1.0]
    assert changed(before, trainer) == set()


def test_a_rewarded_token_becomes_likelier(build: Any) -> None:
    def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    trainer = build(even_tokens, max_steps=10, learning_rate=4e-2, per_device_train_batch_size=16)
    trainer.train()
    rewards = [step["reward"] for step in metrics_of(trainer.args.output_dir)]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.12, "0.5 is an even draw; the wrong sign lowers it"


def test_the_reference_computes_as_the_policy_does(build: Any) -> None:
    trainer = build(bf16=True, beta=0.04, max_steps=1)
    trainer.train()
    (step,) = metrics_of(trainer.args.output_dir)
    assert step["kl"] < 1e-9, "nothing has moved yet"


def test_a_rollout_feeds_several_updates(build: Any) -> None:
    trainer = build(
        num_iterations=2, steps_per_generation=4, gradient_accumulation_steps=2, per_device_train_batch_size=4,
        max_steps=8, learning_rate=1e-2,
    )  # fmt: skip
    rollouts, computed, accumulated = [], [], []
    generate, logprobs, accumulate = trainer.engine.generate, trainer.updater.logprobs, trainer.updater.accumulate

    def spy_generate(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        rollouts.append([prompt.row_id for prompt in prompts])
        return generate(prompts, *args, **kwargs)

    def spy_logprobs(groups: Any) -> Any:
        computed.append([group.prompt.row_id for group in groups])
        return logprobs(groups)

    def spy_accumulate(groups: Any) -> Any:
        accumulated.append([group.prompt.row_id for group in groups])
        assert all(group.old_logprobs is not None for group in groups)
        return accumulate(groups)

    trainer.engine.generate, trainer.updater.logprobs, trainer.updater.accumulate = (
        spy_generate, spy_logprobs, spy_accumulate,
    )  # fmt: skip
    trainer.train()
    assert [len(rows) for rows in rollouts] == [4, 4]
    assert not set(rollouts[0]) & set(rollouts[1])
    first, second = ([rows[:2], rows[2:]] for rows in rollouts)
    assert computed == first + second
    assert accumulated == first * 2 + second * 2
    steps = metrics_of(trainer.args.output_dir)
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert ["reward" in step for step in steps] == [True, False, False, False] * 2
    written = sorted(path.name for path in (Path(trainer.args.output_dir) / "completions").iterdir())
    assert written == ["completions_00001.parquet", "completions_00005.parquet"]
    # The first update follows the policy that drew; later ones do not.
    assert steps[0]["clip_ratio/region_mean"] == steps[4]["clip_ratio/region_mean"] == 0.0
    assert steps[3]["clip_ratio/region_mean"] > 0.0


@pytest.mark.parametrize(
    ("drawn", "in_step", "steps"), [(3, 2, {1: 3, 2: 3}), (1, 2, {1: 2, 2: 2, 3: 2})], ids=("amid", "several")
)
def test_rollouts_and_optimizer_steps_need_not_fit(build: Any, drawn: int, in_step: int, steps: dict[int, int]) -> None:
    """`drawn` micro-batches of one prompt a rollout: step → the prompts drawn in it, each trained on once."""
    trainer = build(
        steps_per_generation=drawn, gradient_accumulation_steps=in_step, per_device_train_batch_size=4,
        max_steps=3, optim="sgd",
    )  # fmt: skip
    trained: list[list[int]] = []
    accumulate = trainer.updater.accumulate

    def spy(groups: Any) -> Any:
        trained.append([group.prompt.row_id for group in groups])
        assert all((group.old_logprobs is None) == (drawn == 1) for group in groups)
        return accumulate(groups)

    trainer.updater.accumulate = spy
    trainer.train()
    rows = {step: completions_of(trainer.args.output_dir, step) for step in steps}
    assert {step: len(found) // 4 for step, found in rows.items()} == steps
    assert [len(one) for one in trained] == [in_step] * 3
    assert [row for one in trained for row in one] == [row["row_id"] for found in rows.values() for row in found[::4]]
    assert ["reward" in step for step in metrics_of(trainer.args.output_dir)] == [step in steps for step in (1, 2, 3)]


def test_accumulation_changes_nothing_but_memory(build: Any, tmp_path: Path) -> None:
    losses = []
    for size, accumulated in ((16, 1), (4, 4)):
        trainer = build(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=2, optim="sgd",
            output_dir=str(tmp_path / str(size)),
        )  # fmt: skip
        trainer.train()
        losses.append([(step["loss"], step["grad_norm"]) for step in metrics_of(trainer.args.output_dir)])
    for one, many in zip(*losses, strict=True):
        assert one == pytest.approx(many, rel=1e-4, abs=1e-6)


def test_prompts_can_be_what_is_counted(build: Any) -> None:
    trainer = build(batch_unit="prompts", per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=1)
    trainer.train()
    rows = completions_of(trainer.args.output_dir, 1)
    assert len(rows) == 12
    assert len({row["row_id"] for row in rows}) == 3


def test_two_ranks_equal_one_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("data_parallel_run.py"))
    sources = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "profiling"))
    two_ranks = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(script, str(tiny_model_dir), str(tmp_path / "two")),
        ],
        env=os.environ | {"PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    alone = runpy.run_path(script)
    for name in alone["SCENARIOS"]:
        alone["train"](str(tiny_model_dir), tmp_path / "one", name)
    try:
        output, _ = two_ranks.communicate(timeout=120)
    finally:
        two_ranks.kill()
    assert two_ranks.returncode == 0, output
    start = load_file(tiny_model_dir / "model.safetensors")
    for name in alone["SCENARIOS"]:
        one, two = (load_file(tmp_path / ranks / name / "model.safetensors") for ranks in ("one", "two"))
        for key, value in one.items():
            difference, update = (two[key] - value).abs().max(), (start[key] - value).abs().max()
            assert difference < 1e-6, (name, key)
            assert difference < 0.01 * update, (name, key)  # a random model's vision tower hardly moves
        one_log, two_log = (metrics_of(tmp_path / ranks / name) for ranks in ("one", "two"))
        for step, other in zip(one_log, two_log, strict=True):
            for key in step.keys() - {"step_time", "tokens_per_second", "mfu"}:
                if not key.startswith(("time/", "share/")):
                    assert other[key] == pytest.approx(step[key], rel=1e-4, abs=1e-6), (name, step["step"], key)
