"""What a run says of its speed while it runs: the numbers, the line, and TensorBoard."""

import io
import json

import pytest
import torch
from fastgrpo_profiling import SpanTotal
from fastgrpo_profiling.roofline import ModelShape, StepWork, Update, step_flops
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from fastgrpo.config import GRPOConfig
from fastgrpo.data.loading import load_rows
from fastgrpo.model.load import load_policy
from fastgrpo.training.live_figures import LiveFigures, trained_part, update_of, work_of
from fastgrpo.training.progress import ProgressDisplay
from fastgrpo.training.trainer import GRPOTrainer
from fastgrpo.types import Completion, Prompt, ScoredRollout, TrainingGroup

METRICS = ("mfu", "share/rollout", "share/reward", "share/update", "share/other", "tokens_per_second")


def prompt(length: int, grid: list[list[int]] | None) -> Prompt:
    ids, positions = torch.zeros(length, dtype=torch.int64), torch.zeros(3, length, dtype=torch.int64)
    return Prompt(0, ids, positions, None, None if grid is None else torch.tensor(grid), "")


def completions(*lengths: int) -> tuple[Completion, ...]:
    none = [torch.zeros(n) for n in lengths]
    return tuple(Completion(0, i, none[i].long(), "", "stop", none[i], none[i]) for i in range(len(lengths)))


def weighted(group: ScoredRollout, advantages: list[float]) -> TrainingGroup:
    ones = tuple(torch.ones(len(c.token_ids)) for c in group.completions)
    masks = tuple(one.bool() for one in ones)
    return TrainingGroup(group.prompt, group.completions, torch.tensor(advantages), ones, masks)


ROLLOUT = [
    ScoredRollout(prompt(7, [[1, 4, 6], [1, 2, 2]]), completions(3, 5), torch.zeros(2, 1)),
    ScoredRollout(prompt(4, None), completions(2, 2), torch.zeros(2, 1)),
]


def test_work_is_what_was_drawn_and_what_has_a_gradient():
    assert work_of(ROLLOUT) == StepWork([7, 4], [24, 4], [[3, 5], [2, 2]])
    groups = [weighted(ROLLOUT[0], [0.0, 0.0]), weighted(ROLLOUT[1], [1.0, 0.0])]
    assert trained_part(groups, beta=0.0) == StepWork([4], [], [[2]])
    assert trained_part(groups, beta=0.04) == work_of(ROLLOUT)


@pytest.fixture
def config(tmp_path):
    return GRPOConfig(
        output_dir=str(tmp_path),
        batch_unit="prompts",
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        max_steps=2,
        logging_steps=1,
        beta=0.04,  # so that completions of equal rewards are trained on, too
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
    )


def test_what_trains_decides_what_a_backward_pass_computes(tiny_model_dir, config):
    whole = load_policy(str(tiny_model_dir))
    assert update_of(whole, config) == Update(reference_pass=True)
    without_tower = load_policy(str(tiny_model_dir), freeze_vision=True)
    assert update_of(without_tower, config) == Update(reference_pass=True, vision_trains=False)
    adapters = get_peft_model(whole, LoraConfig(target_modules=["q_proj"]))
    assert update_of(adapters, config) == Update(reference_pass=True, text_trains=False, vision_trains=False)
    in_tower = get_peft_model(load_policy(str(tiny_model_dir)), LoraConfig(target_modules="all-linear"))
    assert update_of(in_tower, config) == Update(True, text_trains=False, vision_trains=False, vision_adapts=True)


def test_mfu_is_the_steps_flops_over_its_time_and_the_ceiling(tiny_model_dir, config):
    model = load_policy(str(tiny_model_dir))
    figures = LiveFigures(model, config, "cpu")
    assert "mfu" not in figures.of_step({}, 1.0)
    figures.ceiling = 1e9
    figures.drew(ROLLOUT)
    figures.trains_on(trained_part([weighted(ROLLOUT[0], [1.0, -1.0])], beta=0.0))
    spans = {"rollout": SpanTotal(1, 1.5, 0.5), "rollout/decode": SpanTotal(3, 1.0, 1.0)}
    found = figures.of_step(spans, 2.0)
    shape, trained = ModelShape.from_config(model.config), StepWork([7], [24, 4], [[3, 5]])
    flops = step_flops(shape, work_of(ROLLOUT), Update(reference_pass=True), trained)
    assert found["mfu"] == pytest.approx(sum(flops.values()) / 2e9)
    assert (found["share/rollout"], found["share/other"], found["time/rollout"]) == (0.5, 0.5, 1.5)
    assert figures.of_step({}, 1.0)["mfu"] == 0  # nothing is told twice


@pytest.fixture
def trainer(tiny_model_dir, sat_file, config):
    return GRPOTrainer(str(tiny_model_dir), "format", config, load_rows(str(sat_file)))


def test_every_run_logs_them_and_tensorboard_shows_them(trainer, tmp_path, capsys):
    trainer.train()
    steps = [json.loads(line) for line in trainer.run_log.metrics_file.read_text().splitlines()]
    for step in steps:
        assert 0 < step["mfu"] < 1.5
        assert sum(step[f"share/{part}"] for part in ("rollout", "reward", "update", "other")) == pytest.approx(1)
        assert step["share/rollout"] > 0.05
        assert step["share/update"] > 0.05
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    for name in METRICS:
        scalars = board.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [1, 2], name
        assert [s.value for s in scalars] == pytest.approx([step[name] for step in steps], rel=1e-5), name
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    for told in ("tok/s", "MFU ", "% rollout", "% update", "ETA "):
        assert told in lines[0]


def test_a_narrow_terminal_keeps_the_bar(config):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    display = ProgressDisplay(config, console)
    state = TrainerState(max_steps=1500, global_step=340, is_world_process_zero=True)
    display.on_train_begin(None, state, TrainerControl())
    display.show(state, {"reward": 0.5, "completions/mean_length": 231.0, "entropy": 0.8, "tokens_per_second": 1e4})
    display.close()
    last = console.file.getvalue().splitlines()[-2]
    assert " 340/1500" in last
    assert "reward 0.500" in last
    assert "…" in last


def test_the_live_line_leaves_out_what_is_next_to_nothing(config):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    display = ProgressDisplay(config, console)
    state = TrainerState(max_steps=2, is_world_process_zero=True)
    display.on_train_begin(None, state, TrainerControl())
    shares = {"share/rollout": 0.6, "share/reward": 0.001, "share/update": 0.3, "share/other": 0.099}
    display.show(state, {"reward": 0.5, "tokens_per_second": 1234.0, "mfu": 0.284, **shares})
    display.close()
    shown = console.file.getvalue()
    assert "reward 0.500  1,234 tok/s  MFU 28%  60% rollout  30% update" in shown


def test_a_run_that_fails_stops_recording(trainer, monkeypatch):
    def fail(*_):
        raise RuntimeError("as asked")

    monkeypatch.setattr(trainer, "score", fail)
    with pytest.raises(RuntimeError, match="as asked"):
        trainer.train()
    assert trainer.end_recording() is None
