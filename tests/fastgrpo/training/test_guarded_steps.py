"""What is not finite, and SIGTERM."""

import json
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import token_sum
from transformers import TrainerCallback

from fastgrpo.training.guarded_steps import NotFiniteError


class Spoil(TrainerCallback):
    """Makes a weight, or a weight's gradient, NaN before the optimizer takes a step."""

    def __init__(self, trainer: Any, step: int, what: str) -> None:
        self.trainer, self.step, self.what = trainer, step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 != self.step:
            return
        parameter = next(one for one in self.trainer.model.parameters() if one.requires_grad)
        if self.what == "weights":
            parameter.data.view(-1)[0] = torch.nan
        elif self.what == "rate":
            self.trainer.optimizer.param_groups[0]["lr"] = torch.nan
        else:
            hook = parameter.register_hook(lambda gradient: (hook.remove(), gradient * torch.nan)[1])


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", ["gradients", "weights", "rate"])
def test_what_is_not_finite_stops_the_run_with_the_last_good_checkpoint(build: Any, tmp_path: Path, what: str) -> None:
    trainer = build(max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.001)
    trainer.add_callback(Spoil(trainer, 3, what))
    with pytest.raises(NotFiniteError, match=r"step 3: .*diverged; the last good checkpoint is .*checkpoint-2\. Lower"):
        trainer.train()
    # A weight that no row of the step reads is found when it would be saved.
    assert steps_of(tmp_path / "run") == ([1, 2, 3] if what == "weights" else [1, 2])
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_weights_that_overflow_are_never_saved(build: Any, tmp_path: Path) -> None:
    trainer = build(max_steps=1, save_strategy="steps", save_steps=1, max_grad_norm=0.0)

    class Overflow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(trainer.model.parameters()).data.view(-1)[0] = torch.inf

    trainer.add_callback(Overflow())
    with pytest.raises(NotFiniteError, match=r"weights are not finite, such as .*none: nothing was saved"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_such_a_step_can_be_left_out(build: Any, tmp_path: Path) -> None:
    trainer = build(max_steps=3, on_nonfinite="skip", learning_rate=0.001)
    trainer.add_callback(Spoil(trainer, 2, "gradients"))
    trainer.train()
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert all(bool(one.isfinite().all()) for one in trainer.model.parameters())


def test_sigterm_saves_after_the_step_and_exits_with_143(build: Any, tmp_path: Path) -> None:
    calls = []

    def terminated(**columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return token_sum(**columns)

    whole = build(terminated, max_steps=3, output_dir=str(tmp_path / "whole"))
    before = signal.getsignal(signal.SIGTERM)
    calls += [1, 1]  # no signal in this one
    whole.train()
    calls.clear()
    trainer = build(terminated, max_steps=3)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    again = build(terminated, max_steps=3)
    again.train(resume_from_checkpoint="last")
    weights = [list(one.model.parameters()) for one in (whole, again)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_disk_that_takes_no_more_is_one_line_and_nothing_is_lost(build: Any, tmp_path: Path) -> None:
    """By a limit on the size of files, from the second save on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Full(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    for limit in (1_000, 100_000, 400_000):
        run = tmp_path / str(limit)
        trainer = build(max_steps=3, save_strategy="steps", save_steps=1, output_dir=str(run), log_completions=False)
        trainer.add_callback(Full())
        try:
            with pytest.raises((ValueError, OSError)) as error:
                trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        told = r"(checkpoint-2 could not be written to .*(File too large|took no more).*go on with|metrics.jsonl)"
        assert re.search(told, str(error.value)), error.value
        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
        again = build(max_steps=3, save_strategy="no", output_dir=str(run), log_completions=False)
        again.train(resume_from_checkpoint="last")
        assert steps_of(run) == [1, 2, 3]
    signal.signal(signal.SIGXFSZ, before)
