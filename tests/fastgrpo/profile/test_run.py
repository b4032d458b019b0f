"""`fastgrpo profile`, end to end on the tiny model, and the page by itself."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fastgrpo_profiling.compare import Comparison, StepRecord
from fastgrpo_profiling.growth import WHOLE, Growth
from fastgrpo_profiling.phases import PHASE_OF
from fastgrpo_profiling.report import Cost, InsideDecode, profile_report
from fastgrpo_profiling.roofline import Ceilings, ModelShape, StepWork, Update
from fastgrpo_profiling.span import SpanEvent
from fastgrpo_profiling.trace import problems

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.main import main
from fastgrpo.profile import gate, run
from fastgrpo.profile.opponents import OURS, PAPER, PLAIN
from fastgrpo.profile.page import render_page
from fastgrpo.profile.run import ProfileOptions, training_flags
from fastgrpo.profile.sides import start
from fastgrpo.profile.sides.start import build_trainer
from fastgrpo.update import packed_forward, updater

SMALL = (
    "{batch_unit: prompts, per_device_train_batch_size: 2, num_generations: 4, max_completion_length: 6, beta: 0.04, "
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
        inside = record["inside_decode"]["shares"][name]
        assert sum(inside.values()) == pytest.approx(1)
        assert {"attention", "matrix products"} <= inside.keys()
    for phase in ("sampling", "head"):  # which are inside other calls on the plain side
        assert record["sides"]["ours"]["phases"][phase] > 0
        assert phase not in record["sides"]["plain"]["phases"]
    assert record["inside_decode"]["shares"]["ours"]["sampling"] > 0
    assert "operators" in record["inside_decode"]["told_apart_by"]
    assert record["span_off_share"] == pytest.approx(
        record["sides"]["ours"]["spans_per_step"]
        * record["span_off_seconds"]
        / record["sides"]["ours"]["step_seconds"]["median"]
    )
    assert record["gate"]["prompts that differ"] == 0
    assert record["growth"] is None

    trace = json.loads((output_dir / "trace.json").read_text())
    assert problems(trace) == []
    names = {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert {"step", "data", "rollout", "rollout/decode", "update/forward", "update/backward", "log"} <= names
    page = (output_dir / "profile.html").read_text()
    assert "ours against plain" in page
    assert not re.search(r"""(src|href)=["']https?:""", page)


class ScriptedSide:
    """Stands for a side's process; its decode takes 1 s."""

    def __init__(self, name: str, settings: Sequence[str]) -> None:
        self.name, self.settings = name, settings

    def ready(self) -> dict[str, int]:
        return {}

    def step(self, trace: bool) -> StepRecord:
        return StepRecord(2.0, 1, 0.0, 0, {"rollout/decode": 1.0, "rollout/vision": 1.0})

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("flags", "halves"),
    [
        ([], {"num_generations": 2, "per_device_train_batch_size": 2}),
        (
            ["--batch_unit", "completions", "--per_device_train_batch_size", "16", "--generation_batch_size", "32"],
            {"num_generations": 2, "per_device_train_batch_size": 8, "generation_batch_size": 16},
        ),
    ],
)
def test_scale_takes_the_steps_again_with_half_the_completions(flags, halves, config_file, tmp_path, monkeypatch):
    started: list[ScriptedSide] = []

    def start_side(name, settings, *_, **__):
        started.append(ScriptedSide(name, settings))
        return started[-1]

    monkeypatch.setattr(start, "start_side", start_side)
    options = ProfileOptions(config_file, "plain", 2, 0, tmp_path, Path("python"), flags, scale=True)
    settings = training_flags(options)
    config, _ = parse([*settings, "--output_dir", str(tmp_path)])
    full = [StepRecord(3.0, 1, 0.0, 0, {"rollout/decode": 2.0, "rollout/vision": 1.0})]
    found = run.growth_of(options, settings, config, Comparison({OURS: full, "plain": full}, {}))
    assert found.doubled == "2 to 4 completions a prompt"
    assert found.exponents["plain"] == {"vision": 0, "decode": 1, WHOLE: pytest.approx(0.585, abs=1e-3)}
    assert [side.name for side in started] == [OURS, "plain"]
    half, _ = parse([*started[0].settings, "--output_dir", str(tmp_path)])
    assert {name: getattr(half, name) for name in halves} == halves
    assert half.batch_plan.prompts_per_rollout == config.batch_plan.prompts_per_rollout


@pytest.mark.parametrize("op", ["micro_loss", "linear_logprob"])
def test_an_op_with_a_flipped_sign_is_refused_a_timing(
    op, config_file, tiny_model_dir, sat_file, tmp_path, monkeypatch, capsys
):
    module = {"micro_loss": updater, "linear_logprob": packed_forward}[op]
    right = getattr(module, op)

    def flipped(*args, **kwargs):
        output = right(*args, **kwargs)
        return output._replace(**{output._fields[0]: -output[0]})

    monkeypatch.setattr(module, op, flipped)
    monkeypatch.setattr(run, "alternate", lambda *_, **__: pytest.fail("a broken op was timed"))
    given = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file)]
    assert main(["profile", str(config_file), "--output_dir", str(tmp_path / "profile"), *given]) == 2
    assert "refused a timing" in capsys.readouterr().err
    assert not (tmp_path / "profile" / "profile.json").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["none.yaml"], "none.yaml"),
        (["CONFIG", "--against", "unsloth"], "unsloth"),
        (["CONFIG", "--steps", "0"], "--steps"),
        (["CONFIG", "--scale", "--num_generations", "2"], "--scale halves num_generations=2"),
        (["CONFIG", "--against", "trl", "--trl_python", "nowhere/python"], "make install-bench"),
        (["CONFIG", "--learning_rat", "1"], "--learning_rat"),
        (["CONFIG", "--against", "paper", "--use_peft"], "leave out use_peft"),
    ],
)
def test_mistakes_are_told_in_a_line(argv, told, config_file, tmp_path, capsys):
    argv = [str(config_file) if token == "CONFIG" else token for token in argv]
    assert main(["profile", *argv, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_adapters_and_checkpointing_are_those_of_the_run(config_file, tiny_model_dir, sat_file, tmp_path):
    given = {"config": config_file, "model_name_or_path": tiny_model_dir, "dataset_name": sat_file}
    flags = [token for name, value in given.items() for token in (f"--{name}", str(value))]
    own = ["--output_dir", str(tmp_path), "--use_peft", "--gradient_checkpointing", "true", "--lora_dropout", "0.5"]
    config, script = parse([*flags, *own])
    ours, plain = (build_trainer(side, config, script) for side in (OURS, PLAIN))
    batch = gate.draw_fixed_batch(ours)
    (loss, _, gradients), (their_loss, _, their_gradients) = (gate.loss_and_gradients(t, batch) for t in (ours, plain))
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert ours.model.is_gradient_checkpointing
    found = gate.Gate()
    gate.compare_update(found, (loss, gradients), (their_loss, their_gradients), gate.FP32)
    assert not found.failures


def test_a_config_without_model_and_data_gets_the_demos(config_file, tmp_path):
    options = ProfileOptions(config_file, "plain", 3, 1, tmp_path, Path("python"), ["--learning_rate", "0.5"])
    config, script = parse([*training_flags(options), "--output_dir", str(tmp_path)])
    assert Path(script.dataset_name).is_file()
    assert Path(script.model_name_or_path).name == "tiny-qwen2-vl-base"
    assert (config.max_steps, config.learning_rate, config.save_strategy) == (7, 0.5, "no")


def test_the_paper_draws_one_completion_at_a_time_and_keeps_a_frozen_model(
    config_file, tiny_model_dir, sat_file, tmp_path
):
    given = {"config": config_file, "model_name_or_path": tiny_model_dir, "dataset_name": sat_file}
    flags = [token for name, value in given.items() for token in (f"--{name}", str(value))]
    own = ["--output_dir", str(tmp_path), "--max_steps", "1", "--beta", "0"]
    trainer = build_trainer(PAPER, *parse([*flags, *own]))
    calls = []
    generate = trainer.model.generate
    trainer.model.generate = lambda **given: calls.append(len(given["input_ids"])) or generate(**given)
    assert trainer.config.beta == 0
    assert trainer.updater.reference_model is not trainer.model
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert calls == 8 * [1]
    assert all(torch.equal(p, before[n]) for n, p in trainer.updater.reference_model.named_parameters())


def test_every_phase_has_a_span_somewhere():
    root = Path(__file__).parents[3]
    sources = "".join(path.read_text() for folder in ("fastgrpo", "bench") for path in (root / folder).rglob("*.py"))
    assert [name for name in PHASE_OF if f'"{name}"' not in sources] == []


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
        Cost(shape, ceilings, 4, Update(reference_pass=True)) if known else None,
        ceilings,
        {"loss": 1e-7},
        1e-7,
        {"model": "<b>tiny</b>"},
        InsideDecode.of({OURS: {"attention": 3.0, "other": 1.0}, "plain": {}}, "cuda") if known else None,
        Growth("4 to 8 completions a prompt", {OURS: {"decode": 1.0}, "plain": {WHOLE: 0.5}}) if known else None,
    )
    assert report.speedup.median == 4
    assert report.sides[OURS].unattributed == pytest.approx(0.1, abs=0.1)
    events = {OURS: [SpanEvent("rollout/decode", 0.0, 0.5, 1, 1, 1 << 30)] if known else [], "plain": []}
    page = render_page(report, events, {name: [s.seconds for s in one] for name, one in comparison.steps.items()})
    assert "4.00× as fast a step" in page
    assert "&lt;b&gt;tiny" in page
    assert "<script" not in page
    assert ("Model FLOPs per second" in page) == known
    assert ("told apart by names of the GPU&#39;s kernels" in page) == known
    assert ("<td>decode</td><td>1.00</td><td>–</td>" in page) == known
    assert ("<td>attention</td><td>75.0&nbsp;%</td><td>–</td>" in page) == known
    assert len(re.findall("<figure>\n  <h3>", page)) == (4 if known else 1)
