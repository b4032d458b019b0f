import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.training.trainer import GRPOTrainer

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[3]


def token_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs from completion to completion, whatever the model says."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def constant(completions: list[Any], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def abstaining(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A value for every other completion."""
    return [None if i % 2 else float(len(ids)) for i, ids in enumerate(completion_ids)]


@pytest.fixture
def build(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Any:
    """A trainer with quick settings: two prompts a step, four completions each, at most six tokens long."""

    def make(
        reward_funcs: Any = token_sum, model: Any = None, train_dataset: Any = None, **overrides: Any
    ) -> GRPOTrainer:
        parts = {
            name: overrides.pop(name)
            for name in ("eval_dataset", "callbacks", "peft_config", "processing_class", "optimizers")
            if name in overrides
        }
        settings = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "save_strategy": "no",
            "max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6,
            "learning_rate": 0.1, "logging_steps": 1, "disable_tqdm": True,
        }  # fmt: skip
        return GRPOTrainer(
            model=str(tiny_model_dir) if model is None else model,
            reward_funcs=reward_funcs,
            args=GRPOConfig(**settings | overrides),
            train_dataset=load_rows(str(sat_file)) if train_dataset is None else train_dataset,
            **parts,
        )

    return make


def parameters(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(before: dict[str, Tensor], trainer: GRPOTrainer) -> set[str]:
    return {name for name, value in parameters(trainer).items() if not torch.equal(value, before[name])}


def metrics_of(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def completions_of(folder: Any, step: int) -> list[dict[str, Any]]:
    return pq.read_table(Path(folder) / "completions" / f"completions_{step:05d}.parquet").to_pylist()


# What an update moves, and what it does not


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
    assert step["kl"] == 0.0, "nothing has moved yet"


# Rewards


def test_reward_weights(build: Any) -> None:
    trainer = build([token_sum, "length"], reward_weights=[0.7, -20.0], max_steps=2)
    trainer.train()
    for number, step in enumerate(metrics_of(trainer.args.output_dir), start=1):
        parts = [step[f"rewards/{name}/mean"] for name in ("token_sum", "length_reward")]
        assert step["reward"] == pytest.approx(0.7 * parts[0] - 20.0 * parts[1], abs=1e-5)
        for row in completions_of(trainer.args.output_dir, number):
            assert row["reward"] == pytest.approx(
                0.7 * row["rewards/token_sum"] - 20.0 * row["rewards/length_reward"], abs=1e-5
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


# Rollouts and the updates they feed


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


# Logs

METRICS = {
    "num_tokens", "step_time", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length",
    "completions/clipped_ratio", "rewards/token_sum/mean", "rewards/token_sum/std", "reward", "reward_std",
    "frac_reward_zero_std", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean",
    "clip_ratio/high_max", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/max", "loss", "grad_norm",
    "learning_rate", "epoch", "tokens_per_second", "reflection_rate", "skipped_rows", "time/rollout", "time/reward",
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
    assert steps[0]["kl"] == 0.0 < steps[1]["kl"]


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
            "rewards/token_sum", "rewards/accuracy_reward", "task", "solution", "thumbnail",
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


# Data


def test_corrupt_rows_are_left_out_and_counted(build: Any, sat_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pq.read_table(sat_file).slice(0, 8).to_pylist()
    for index in (1, 4, 5):
        rows[index]["image_bytes"] = [b"no picture"]
    trainer = build(train_dataset=rows, shuffle_dataset=False, max_steps=4, optim="sgd")
    before = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before[state.global_step + 1] = parameters(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    steps = metrics_of(trainer.args.output_dir)
    assert [step["skipped_rows"] for step in steps] == [1, 1, 3, 3]
    assert {row["row_id"] for row in completions_of(trainer.args.output_dir, 1)} == {0}
    assert steps[2]["loss"] == steps[2]["grad_norm"] == 0.0, "both rows of the third step were bad"
    assert "reward" not in steps[2]
    assert all(torch.equal(before[3][name], value) for name, value in before[4].items())
    assert not all(torch.equal(before[1][name], value) for name, value in before[2].items())
    assert {row["row_id"] for row in completions_of(trainer.args.output_dir, 4)} == {6, 7}


def test_nothing_but_corrupt_rows(build: Any, sat_file: Path) -> None:
    rows = pq.read_table(sat_file).slice(0, 8).to_pylist()
    for row in rows:
        row["image_bytes"] = [b"no picture"]
    with pytest.raises(ValueError, match=r"none of the 8 rows can be used; row 0: .*image"):
        build(train_dataset=rows)


def test_a_data_set_smaller_than_a_rollout(build: Any, sat_file: Path) -> None:
    trainer = build(train_dataset=pq.read_table(sat_file).slice(0, 1).to_pylist())
    with pytest.raises(ValueError, match="1 rows, but one rollout takes 2 prompts"):
        trainer.train()


def test_conversations_with_and_without_pictures(build: Any) -> None:
    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]

    picture = Image.new("RGB", (84, 56), "blue")
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [ask("What colour?"), ask("Two and two?"), ask("Blue or red?"), ask("Why?")],
            "image": [picture, None, picture, None],
            "solution": ["blue", "4", "blue", "so"],
        },
        features=datasets.Features(
            {
                "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
                "image": datasets.Image(),
                "solution": datasets.Value("string"),
            }
        ),
    )
    seen: list[dict[str, Any]] = []

    def judge(prompts: Any, completions: Any, solution: list[str], **columns: Any) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, "solution": solution, **columns})
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = build(judge, train_dataset=rows, max_steps=2, beta=0.04, shuffle_dataset=False)
    before = parameters(trainer)
    trainer.train()
    assert changed(before, trainer) == set(before)
    assert [call["solution"] for call in seen] == [["blue"] * 4 + ["4"] * 4, ["blue"] * 4 + ["so"] * 4]
    user = seen[0]["prompts"][0][-1]["content"]
    assert user == [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    assert seen[0]["prompts"][4][-1]["content"] == "Two and two?"
    assert all([message["role"] for message in completion] == ["assistant"] for completion in seen[0]["completions"])
    prompts = [row["prompt"] for row in completions_of(trainer.args.output_dir, 1)]
    assert prompts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert prompts[0].endswith("<|im_end|>\n<|im_start|>assistant\n")


# Evaluation, models, callbacks


def test_evaluate(build: Any, cvbench_file: Path) -> None:
    rows = load_rows(str(cvbench_file), max_samples=5)
    trainer = build([token_sum, "format"], eval_dataset=rows, num_generations_eval=2, per_device_eval_batch_size=3)
    before, state = parameters(trainer), torch.get_rng_state()
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_rewards/token_sum/mean", "eval_completions/mean_length"} <= set(metrics)
    assert metrics["eval_rewards/format_reward/mean"] == 0.0
    assert trainer.evaluate() == metrics
    assert changed(before, trainer) == set()
    assert torch.equal(torch.get_rng_state(), state)
    assert {"eval_reward"} <= set(trainer.state.log_history[-1])
    assert set(trainer.evaluate(rows, metric_key_prefix="test")) == {name.replace("eval_", "test_") for name in metrics}


def test_evaluation_does_not_disturb_training(build: Any, cvbench_file: Path, tmp_path: Path) -> None:
    rewards = []
    for strategy in ("no", "steps"):
        trainer = build(
            eval_dataset=load_rows(str(cvbench_file), max_samples=3), eval_strategy=strategy, eval_steps=1, max_steps=3,
            num_generations_eval=2, output_dir=str(tmp_path / strategy),
        )  # fmt: skip
        trainer.train()
        rewards.append([(step["reward"], step["loss"]) for step in metrics_of(tmp_path / strategy)])
    assert rewards[0] == rewards[1]
    assert [line["step"] for line in trainer.state.log_history if "eval_reward" in line] == [1, 2, 3]


def test_evaluation_needs_rows(build: Any) -> None:
    with pytest.raises(ValueError, match="eval_dataset is missing"):
        build().evaluate()


def test_a_saved_model_loads_anywhere(build: Any, tmp_path: Path) -> None:
    trainer = build(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    trained = parameters(trainer)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    processing = load_processing(str(tmp_path / "saved"))
    assert processing.tokenizer.get_vocab() == trainer.processing.tokenizer.get_vocab()
    assert processing.image_processor.size == trainer.processing.image_processor.size
    assert GRPOTrainer(str(tmp_path / "saved"), "length", trainer.config, trainer.train_dataset) is not None


def test_callbacks_are_called(build: Any) -> None:
    calls: list[tuple[str, int]] = []
    logs: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("begin", state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("step", state.global_step))
            control.should_training_stop = state.global_step == 2

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs.append(kwargs["logs"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(("end", state.global_step))

    trainer = build(callbacks=[Watch()], max_steps=5)
    trainer.train()
    assert calls == [("begin", 0), ("step", 1), ("step", 2), ("end", 2)]
    assert {"loss", "reward", "rewards/token_sum/mean"} <= set(logs[0])


def test_the_users_own_optimizer(build: Any, tiny_model_dir: Path) -> None:
    model = load_policy(str(tiny_model_dir))
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer = build(model=model, optimizers=(optimizer, None))
    before = parameters(trainer)
    trainer.train()
    assert changed(before, trainer) == {"model.language_model.embed_tokens.weight"}, "tied to the head"


# Several ranks


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
