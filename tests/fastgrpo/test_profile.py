"""`fastgrpo profile`, end to end on the tiny model, and the page by itself."""

import json
import re
from pathlib import Path

import pytest
import torch
from fastgrpo_profiling.compare import Comparison, StepRecord
from fastgrpo_profiling.report import Cost, profile_report
from fastgrpo_profiling.roofline import Ceilings, ModelShape, StepWork
from fastgrpo_profiling.span import SpanEvent
from fastgrpo_profiling.trace import problems

from fastgrpo.arguments import parse
from fastgrpo.cli import main
from fastgrpo.profile.page import render_page
from fastgrpo.profile.run import ProfileOptions, training_flags
from fastgrpo.profile.sides import OURS, PAPER, build_trainer

SMALL = (
    "{batch_unit: prompts, per_device_train_batch_size: 2, num_generations: 2, max_completion_length: 6, beta: 0.04, "
    "use_cpu: true}"
)


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL)
    return path


def test_profile_against_plain_end_to_end(config_file, tiny_model_dir, sat_file, tmp_path, capsys):
    output_dir = tmp_path / "profile"
    given = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file)]
    options = ["--against", "plain", "--steps", "2", "--output_dir", str(output_dir)]
    assert main(["profile", str(config_file), *options, *given]) == 0
    assert "as fast as plain" in capsys.readouterr().out

    record = json.loads((output_dir / "profile.json").read_text())
    assert set(record["sides"]) == set(record["steps"]) == {"ours", "plain"}
    for name, side in record["sides"].items():
        assert len(record["steps"][name]) == 2
        for phase in ("data", "images", "vision", "prefill", "decode", "forward", "backward", "optimizer"):
            assert side["phases"][phase] > 0, phase
        assert 0 <= side["unattributed"] < 0.5
        assert side["tokens"] > 0
        assert side["peak_bytes"] > 0
        assert side["utilisation"]["mfu"] > 0
    assert record["sides"][OURS]["phases"]["sampling"] > 0
    assert record["gate"]["prompts that differ"] == 0

    trace = json.loads((output_dir / "trace.json").read_text())
    assert problems(trace) == []
    names = {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert {"step", "data", "rollout", "rollout/decode", "update/forward", "update/backward", "log"} <= names
    page = (output_dir / "profile.html").read_text()
    assert "ours against plain" in page
    assert not re.search(r"""(src|href)=["']https?:""", page)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["none.yaml"], "none.yaml"),
        (["CONFIG", "--against", "unsloth"], "unsloth"),
        (["CONFIG", "--steps", "0"], "--steps"),
        (["CONFIG", "--against", "trl", "--trl_python", "nowhere/python"], "make install-bench"),
        (["CONFIG", "--learning_rat", "1"], "--learning_rat"),
    ],
)
def test_mistakes_are_told_in_a_line(argv, told, config_file, tmp_path, capsys):
    argv = [str(config_file) if token == "CONFIG" else token for token in argv]
    assert main(["profile", *argv, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_config_without_model_and_data_gets_the_demos(config_file, tmp_path):
    options = ProfileOptions(config_file, "plain", 3, 1, tmp_path, Path("python"), ["--learning_rate", "0.5"])
    config, script = parse([*training_flags(options), "--output_dir", str(tmp_path)])
    assert Path(script.dataset_name).is_file()
    assert Path(script.model_name_or_path).name == "tiny-qwen2-vl-base"
    assert (config.max_steps, config.learning_rate, config.save_strategy) == (6, 0.5, "no")


def test_the_paper_draws_one_completion_at_a_time_and_keeps_a_frozen_model(
    config_file, tiny_model_dir, sat_file, tmp_path
):
    given = {"config": config_file, "model_name_or_path": tiny_model_dir, "dataset_name": sat_file}
    flags = [token for name, value in given.items() for token in (f"--{name}", str(value))]
    own = ["--output_dir", str(tmp_path), "--max_steps", "1", "--beta", "0"]
    trainer = build_trainer(PAPER, *parse([*flags, *own]))
    calls = []
    generate = trainer.engine._generate
    trainer.engine._generate = lambda prompts, params: calls.append(len(prompts)) or generate(prompts, params)
    assert trainer.config.beta == 0
    assert trainer.policy.reference_model is not trainer.model
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert calls == [1, 1, 1, 1]
    assert all(torch.equal(p, before[n]) for n, p in trainer.policy.reference_model.named_parameters())


def made_up_steps(seconds: float) -> list[StepRecord]:
    own = {"data": 0.1 * seconds, "rollout/decode": 0.5 * seconds, "update/backward": 0.39 * seconds, "step": 0.0}
    work = StepWork([10], [16], [[5, 7]])
    return [StepRecord(seconds * (1 + i / 10), 12, 0.5, 2 << 30, own, 9, [], work) for i in range(3)]


@pytest.mark.parametrize("known", [True, False])
def test_the_page_shows_both_sides_and_loads_nothing(known):
    ceilings = Ceilings(3e10, 1e10, "float32")
    shape = ModelShape(16, 2, 2, 1, 8, 32, 99, 1, 8, 128, 588, 4)
    comparison = Comparison({OURS: made_up_steps(1.0), "plain": made_up_steps(4.0)}, {})
    report = profile_report(
        comparison,
        {OURS: 1 << 30, "plain": 1 << 30},
        Cost(shape, ceilings, 4, True) if known else None,
        ceilings,
        {"loss": 1e-7},
        1e-7,
        {"model": "<b>tiny</b>"},
    )
    assert report.speedup.median == 4
    assert report.sides[OURS].unattributed == pytest.approx(0.1, abs=0.1)
    events = {OURS: [SpanEvent("rollout/decode", 0.0, 0.5, 1, 1, 1 << 30)] if known else [], "plain": []}
    page = render_page(report, events, {name: [s.seconds for s in one] for name, one in comparison.steps.items()})
    assert "4.00× as fast a step" in page
    assert "&lt;b&gt;tiny" in page
    assert "<script" not in page
    assert ("Model FLOPs per second" in page) == known
    assert len(re.findall("<figure>", page)) == (5 if known else 2)
