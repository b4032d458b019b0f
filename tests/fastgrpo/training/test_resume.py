import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_qwen import tiny_qwen
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.cli.main import main
from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.demo.base_model import save_model
from fastgrpo.model.load import load_processing, load_weights
from fastgrpo.training import transformers_hooks
from fastgrpo.training.trainer import GRPOTrainer

ROOT = Path(__file__).parents[3]
REWARDS = '''
import hashlib

def varied(completions, **_):
    """Hashes of the text: groups differ within, whatever the model says."""
    return [hashlib.sha256(text.encode()).digest()[0] / 255 for text in completions]
'''
# Three steps an epoch, so runs cross epochs; log lines and checkpoints fall on different steps.
FLAGS = [
    "--max_samples", "6", "--num_generations", "4", "--per_device_train_batch_size", "8", "--max_completion_length",
    "8", "--use_cpu", "--learning_rate", "0.01", "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--beta",
    "0.04", "--temperature", "0.9", "--top_k", "50", "--logging_steps", "3", "--save_steps", "2", "--report_to",
    "none", "--disable_tqdm", "true", "--reward_funcs", "my_rewards:varied", "format",
]  # fmt: skip
DEADLINE_S = 120


@pytest.fixture(autouse=True)
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's reward module, importable here; PYTHONPATH of the runs in their own process."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return folder


@pytest.fixture
def flags(tiny_model_dir: Path, sat_file: Path) -> Callable[..., list[str]]:
    """The command line of a run into a folder."""

    def make(output_dir: Path, *more: str) -> list[str]:
        paths = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file)]
        return ["train", *paths, "--output_dir", str(output_dir), *FLAGS, *more]

    return make


@pytest.fixture
def kill_run(my_rewards: Path, tmp_path: Path) -> Callable[[Sequence[str], Path], None]:
    """Starts a run in a process of its own and kills it, without warning, as soon as a file is there."""

    def start_and_kill(arguments: Sequence[str], when: Path) -> None:
        sources = [my_rewards, ROOT, ROOT / "kernels", ROOT / "profiling"]
        with (tmp_path / "output.txt").open("w") as output:
            run = subprocess.Popen(
                [sys.executable, "-m", "fastgrpo", *arguments],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sources)), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            deadline = time.monotonic() + DEADLINE_S
            while not when.exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            was_running = run.poll() is None
            run.kill()
            run.wait()
        assert was_running, (tmp_path / "output.txt").read_text()
        assert when.exists(), "the run took too long"

    return start_and_kill


def run(arguments: Sequence[str]) -> None:
    assert main(arguments) == 0


def is_clock(name: str) -> bool:
    return name.startswith(("time/", "share/")) or name in ("step_time", "tokens_per_second", "mfu")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_clock(name)} for line in lines]


def completions_of(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pylist() for path in (folder / "completions").glob("*.parquet")}


def log_lines_of(folder: Path, checkpoint: str) -> list[dict[str, Any]]:
    history = json.loads((folder / checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in line.items() if not is_clock(name)} for line in history]


def assert_same_run(found: Path, expected: Path, steps: int, last_checkpoint: str) -> None:
    """Every step in the logs once, with the same figures to the last bit; and the same weights in the end."""
    assert [line["step"] for line in metrics_of(found)] == list(range(1, steps + 1))
    assert metrics_of(found) == metrics_of(expected)
    assert completions_of(found) == completions_of(expected)
    assert log_lines_of(found, last_checkpoint) == log_lines_of(expected, last_checkpoint)
    weights = (Path(last_checkpoint) / "model.safetensors", Path("model.safetensors"))
    for path in weights:
        assert (found / path).read_bytes() == (expected / path).read_bytes(), path
    assert not list(found.glob("previous-*"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    flags: Callable[..., list[str]], kill_run: Callable[[Sequence[str], Path], None], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(flags(whole, "--max_steps", "8"))
    steps = metrics_of(whole)
    assert all(step["grad_norm"] > 0 for step in steps)
    assert len({step["reward"] for step in steps}) == 8

    resume = flags(killed, "--max_steps", "8", "--resume_from_checkpoint")
    # In step 4, its completions drawn: step 3 was logged, and is behind the last checkpoint.
    kill_run(resume, when=killed / "completions" / "completions_00004.parquet")
    assert metrics_of(killed)[:2] == steps[:2], "with nothing to resume from, it starts at the beginning"
    # While checkpoint-6 is being written, or just after.
    kill_run(resume, when=killed / ".saving" / "checkpoint-6")
    assert Qwen2VLForConditionalGeneration.from_pretrained(killed / "checkpoint-4") is not None
    run(resume)
    assert_same_run(killed, whole, steps=8, last_checkpoint="checkpoint-8")


def test_stopped_amid_a_rollout_that_ends_amid_a_step(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Nine micro-batches an epoch, three a rollout, two a step: one is left for an epoch's fifth."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["--steps_per_generation", "3", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"]
    more += ["--lr_scheduler_type", "constant", "--save_steps", "6", "--max_samples", "9"]
    run(flags(whole, *more, "--max_steps", "7"))
    assert sorted(completions_of(whole)) == [f"completions_{step:05d}.parquet" for step in (1, 2, 4, 6, 7)]
    run(flags(stopped, *more, "--max_steps", "6"))
    again = [*more, "--max_steps", "7", "--resume_from_checkpoint", str(stopped / "checkpoint-6")]
    run(flags(stopped, *again))
    assert_same_run(stopped, whole, steps=7, last_checkpoint="checkpoint-7")
    shutil.rmtree(stopped / "checkpoint-6" / "rollout")
    (stopped / "checkpoint-6" / "manifest.json").unlink()  # which would call it missing
    run(flags(stopped, *again))
    rows = {
        (out.name, step): [row["row_id"] for row in completions_of(out)[f"completions_{step:05d}.parquet"]]
        for out, step in ((whole, 6), (whole, 7), (stopped, 7))
    }
    assert rows["stopped", 7] == rows["whole", 6] + rows["whole", 7], "the sixth step's rollout is drawn anew"


def test_killed_amid_a_rollout_that_feeds_several_steps(
    flags: Callable[..., list[str]], kill_run: Callable[[Sequence[str], Path], None], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Two slices, twice: rollouts at steps 1, 5 and 9. Checkpoints fall amid them.
    more = [
        "--max_steps", "12", "--save_steps", "3", "--num_iterations", "2", "--steps_per_generation", "2",
        "--per_device_train_batch_size", "4", "--max_samples", "5",
    ]  # fmt: skip
    run(flags(whole, *more))
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (12, 3, 6, 9)]
    assert sorted(completions_of(whole)) == [f"completions_{step:05d}.parquet" for step in (1, 5, 9)]
    resume = flags(killed, *more, "--resume_from_checkpoint")
    kill_run(resume, when=killed / "completions" / "completions_00009.parquet")
    run(resume)
    assert_same_run(killed, whole, steps=12, last_checkpoint="checkpoint-12")


def test_a_killed_run_of_a_hybrid_model(
    flags: Callable[..., list[str]],
    kill_run: Callable[[Sequence[str], Path], None],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tokenizer = load_processing(str(tiny_model_dir)).tokenizer
    save_model(tmp_path / "hybrid", tiny_qwen("Qwen3_5", tokenizer), tokenizer)
    more = ["--model_name_or_path", str(tmp_path / "hybrid"), "--max_steps", "4"]
    run(flags(whole, *more))
    assert all(step["grad_norm"] > 0 for step in metrics_of(whole))
    resume = flags(killed, *more, "--resume_from_checkpoint")
    kill_run(resume, when=killed / "completions" / "completions_00004.parquet")
    run(resume)
    assert_same_run(killed, whole, steps=4, last_checkpoint="checkpoint-4")


def test_a_kill_during_a_save_leaves_the_checkpoint_before(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(flags(whole, "--max_steps", "5"))
    publish = transformers_hooks.publish

    def killed_while_saving(aside: Path, final: Path) -> None:
        if final.name == "checkpoint-4":
            os.truncate(aside / "model.safetensors", 1000)
            (aside / "optimizer.pt").unlink()
            raise KeyboardInterrupt
        publish(aside, final)

    with monkeypatch.context() as patch:
        patch.setattr(transformers_hooks, "publish", killed_while_saving)
        assert main(flags(killed, "--max_steps", "5")) == 130
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (killed / ".saving" / "checkpoint-4").is_dir()
    assert [step["step"] for step in metrics_of(killed)] == [1, 2, 3, 4]
    (killed / "metrics.jsonl").open("a").write('{"step": 5, "los')  # a line cut off
    (killed / "completions" / ".completions_00005.parquet.part").write_bytes(b"PAR1")
    run(flags(killed, "--max_steps", "5", "--resume_from_checkpoint"))
    assert_same_run(killed, whole, steps=5, last_checkpoint="checkpoint-5")
    assert not (killed / ".saving" / "checkpoint-4").exists()
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 5)]


def test_a_run_that_ended_amid_a_rollout_goes_on_with_it(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    more = ["--lr_scheduler_type", "constant_with_warmup", "--num_iterations", "2", "--steps_per_generation", "2"]
    more += ["--per_device_train_batch_size", "4", "--save_strategy", "no"]
    run(flags(whole, "--max_steps", "6", *more))
    run(flags(longer, "--max_steps", "3", *more, "--save_strategy", "steps", "--save_steps", "3"))
    run(flags(longer, "--max_steps", "6", *more, "--resume_from_checkpoint"))
    assert metrics_of(longer) == metrics_of(whole)
    assert sorted(completions_of(longer)) == [f"completions_{step:05d}.parquet" for step in (1, 5)]
    assert completions_of(longer) == completions_of(whole)
    assert (longer / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_rollout_that_cannot_be_taken_over_is_drawn_anew_in_its_place(
    flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    """As on another number of ranks, whose parts are others."""
    more = ["--num_iterations", "2", "--save_steps", "3"]
    run(flags(tmp_path, "--max_steps", "3", *more))
    shutil.rmtree(tmp_path / "checkpoint-3" / "rollout")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()  # which would call it missing
    run(flags(tmp_path, "--max_steps", "6", *more, "--resume_from_checkpoint"))
    drawn = {file: {row["row_id"] for row in rows} for file, rows in completions_of(tmp_path).items()}
    assert sorted(drawn) == [f"completions_{step:05d}.parquet" for step in (1, 3, 4, 5)]
    assert drawn["completions_00003.parquet"] == drawn["completions_00004.parquet"], "trained on once more, not twice"


def test_resuming_with_more_steps(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    constant = ["--lr_scheduler_type", "constant_with_warmup"]
    run(flags(whole, "--max_steps", "5", *constant))
    run(flags(longer, "--max_steps", "3", *constant))
    assert [step["step"] for step in metrics_of(longer)] == [1, 2, 3]
    run(flags(longer, "--max_steps", "5", *constant, "--resume_from_checkpoint", str(longer / "checkpoint-3")))
    assert metrics_of(longer) == metrics_of(whole)
    assert completions_of(longer) == completions_of(whole)


def test_a_run_that_guesses_draws_the_same_tokens_resumed_too(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    plain, guessing = tmp_path / "plain", tmp_path / "guessing"
    more = ["--lr_scheduler_type", "constant_with_warmup", "--temperature", "0.3"]
    run(flags(plain, "--max_steps", "4", *more))
    run(flags(guessing, "--max_steps", "2", *more, "--speculate", "3"))
    run(flags(guessing, "--max_steps", "4", *more, "--speculate", "3", "--resume_from_checkpoint"))
    assert completions_of(guessing) == completions_of(plain)
    assert (guessing / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    gained = [line["sampling/accepted_per_step"] for line in metrics_of(guessing)]
    assert min(gained) >= 1
    assert max(gained) > 1


def test_resuming_a_finished_run_changes_nothing(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(flags(folder, "--max_steps", "2"))
    before = metrics_of(folder), completions_of(folder), (folder / "model.safetensors").read_bytes()
    run(flags(folder, "--max_steps", "2", "--resume_from_checkpoint"))
    assert (metrics_of(folder), completions_of(folder), (folder / "model.safetensors").read_bytes()) == before


def test_nothing_to_resume_from(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(flags(folder, "--max_steps", "2", "--save_strategy", "no"))
    first = metrics_of(folder)
    run(flags(folder, "--max_steps", "2", "--save_strategy", "no", "--resume_from_checkpoint"))
    assert metrics_of(folder) == first, "from step 0, with clean logs"
    for checkpoint, reason in ((folder / "checkpoint-9", "is not a folder"), (folder, "no optimizer state")):
        assert main(flags(folder, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint))) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("adapters", [False, True])
def test_the_trainer_itself_resumes(tiny_model_dir: Path, sat_file: Path, tmp_path: Path, adapters: bool) -> None:
    rows = pq.read_table(sat_file).slice(0, 6).to_pylist()
    rows[1]["image_bytes"] = [b"no picture"]

    def build(folder: str, max_steps: int) -> GRPOTrainer:
        torch.manual_seed(0)  # adapters start at random
        return GRPOTrainer(
            model=str(tiny_model_dir),
            reward_funcs="my_rewards:varied",
            args=GRPOConfig(
                output_dir=str(tmp_path / folder), use_cpu=True, report_to=[], max_steps=max_steps, save_steps=2,
                num_generations=4, per_device_train_batch_size=8, max_completion_length=6, learning_rate=0.01,
                beta=0.04, lr_scheduler_type="constant", logging_steps=1, shuffle_dataset=False, disable_tqdm=True,
            ),
            train_dataset=rows,
            peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if adapters else None,
        )  # fmt: skip

    build("whole", 4).train()
    build("stopped", 2).train()
    build("stopped", 4).train(resume_from_checkpoint=True)
    assert all(step["grad_norm"] > 0 for step in metrics_of(tmp_path / "whole"))
    assert [step["skipped_rows"] for step in metrics_of(tmp_path / "whole")] == [1, 1, 1, 2]
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")


def test_the_best_checkpoint_comes_back(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> None:
    rows = load_rows(str(sat_file), max_samples=6)
    trainer = GRPOTrainer(
        model=str(tiny_model_dir),
        reward_funcs="my_rewards:varied",
        args=GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=3, save_steps=1, save_total_limit=1,
            eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="reward",
            greater_is_better=True, num_generations=4, per_device_train_batch_size=8, max_completion_length=6,
            learning_rate=0.1, disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )  # fmt: skip
    rewards = iter([0.1, 0.9, 0.2])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_reward": next(rewards)}  # type: ignore
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(best).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's parameters, such as .*norm\.weight"):
        load_weights(model, tmp_path)
