"""`fastgrpo profile`: checks that two sides agree, measures ceilings, takes steps in turn, writes what it found."""

import gc
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from fastgrpo_profiling import span
from fastgrpo_profiling.compare import Comparison, StepRecord, alternate
from fastgrpo_profiling.growth import WHOLE, Growth
from fastgrpo_profiling.phases import in_step_order
from fastgrpo_profiling.report import Cost, InsideDecode, ProfileReport, profile_report
from fastgrpo_profiling.roofline import ModelShape, measure_ceilings
from fastgrpo_profiling.trace import write_trace
from fastgrpo_profiling.worker import WorkerSide
from rich.table import Table

from fastgrpo.atomic_files import write_aside
from fastgrpo.cli.arguments import parse
from fastgrpo.cli.options import require_writable
from fastgrpo.cli.run_arguments import ScriptArguments
from fastgrpo.config import GRPOConfig
from fastgrpo.demo.base_model import BASE_MODEL_PATH
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_sat_parquet
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OURS, PLAIN, TRL
from fastgrpo.profile.page import write_page
from fastgrpo.profile.sides import start
from fastgrpo.profile.trl import compare_with_trl
from fastgrpo.report.environment import environment, processor
from fastgrpo.safe_text.terminal import Terminal
from fastgrpo.training.live_figures import compute_dtype, update_of

console = Terminal(stderr=True)

QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": "true",
    "log_multimodal": "false",
}
"""Settings of every profiled run: what is timed is training, not its reporting."""
DECODE, DECODES_WATCHED = "rollout/decode", 4
"""The span whose operators are recorded, and about how many of its occurrences in a step, evenly spread."""


@dataclass(frozen=True)
class ProfileOptions:
    """Options of `fastgrpo profile`."""

    config: Path
    against: str
    steps: int
    warmup: int
    output_dir: Path
    trl_python: Path
    flags: Sequence[str] = ()
    """Further training flags, which override the config's."""
    scale: bool = False
    """Also take the steps with half the completions a prompt, and show how each phase grows."""


def run_profile(options: ProfileOptions) -> ProfileReport:
    """Compares two sides; prints the table and writes profile.json, trace.json and profile.html.

    Raises:
        ValueError: a setting that cannot work, or sides that do not do the same thing (`gate.GateError`).
    """
    require_writable(options.output_dir)
    if options.against == TRL:
        start.require_trl(options.trl_python)
    settings = training_flags(options)
    config, script = parse([*settings, "--output_dir", str(options.output_dir / "gate")])
    if script.use_peft and options.against != PLAIN:
        raise ValueError(
            f"--against {options.against} trains whole weights: leave out use_peft or use --against plain."
        )
    if options.scale:
        parse([*settings, *_half_group(config), "--output_dir", str(options.output_dir / "gate")])
    ours = start.build_trainer(OURS, config, script)
    shape = ModelShape.known(ours.model.config)
    update, dtype = update_of(ours.model, config), compute_dtype(ours.model, config)
    device = ours.accelerator.device.type
    answer = gate.answer_of(ours)
    del ours
    free_memory()
    checked = _pass_gate(options, settings, config, script, answer)
    free_memory()
    ceilings = measure_ceilings(device, dtype)
    console.print(f"checked: both sides agree; timing {options.steps} steps of each", highlight=False)
    with ExitStack() as stack:
        started = _start_sides(options, settings, stack)
        introduced = {side.name: side.ready() for side in started}
        comparison = alternate(started, warmup=options.warmup, steps=options.steps, progress=_say)
        inside = {side.name: _inside_decode(side, comparison.traced[side.name]) for side in started}
    cost = None if shape is None else Cost(shape, ceilings, dtype.itemsize, update)
    report = profile_report(
        comparison,
        {name: facts["held_bytes"] for name, facts in introduced.items()},
        cost,
        ceilings,
        checked,
        span_off_seconds(),
        _facts(config, script, dtype, device, introduced[OURS]["threads"], comparison.steps[OURS]),
        InsideDecode.of(inside, device),
        growth_of(options, settings, config, comparison) if options.scale else None,
    )
    _write(report, comparison, options.output_dir)
    print_report(report)
    console.print(f"page: {options.output_dir / 'profile.html'}", highlight=False, soft_wrap=True)
    return report


def training_flags(options: ProfileOptions) -> list[str]:
    """The flags that every side trains with. A config without a model and data gets the demo's."""
    try:
        named = dict(yaml.safe_load(options.config.read_text()) or {})
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        named = {}  # `parse` says what is wrong with the file
    given = {token.split("=", 1)[0] for token in options.flags} | {f"--{name}" for name in named}
    flags = ["--config", str(options.config)]
    rollouts = options.warmup + options.steps + 3
    if "--model_name_or_path" not in given:
        flags += ["--model_name_or_path", str(BASE_MODEL_PATH)]
    flags += options.flags
    for name, value in QUIET.items():
        flags += [f"--{name}", value]
    # Three more: one is traced, one records the operators of decode, and one only begins, since a side reports a step
    # when the next one begins.
    flags += ["--max_steps", str(rollouts)]
    if "--dataset_name" not in given:
        data = options.output_dir / "data" / "sat.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        config, _ = parse([*flags, "--dataset_name", str(data), "--output_dir", str(options.output_dir)])
        write_sat_parquet(
            data, config.batch_plan.prompts_per_rollout * min(rollouts, 50), config.seed, kinds=DEMO_KINDS
        )
        flags += ["--dataset_name", str(data)]
    return flags


def _pass_gate(
    options: ProfileOptions,
    settings: Sequence[str],
    config: GRPOConfig,
    script: ScriptArguments,
    answer: gate.Answer,
) -> dict[str, float]:
    limits = gate.tolerances(config, script.dtype)
    if options.against == TRL:
        checked = compare_with_trl(answer, limits, settings, options.output_dir, options.trl_python)
    else:
        checked = gate.compare(answer, start.build_trainer(options.against, config, script), limits)
    checked.require()
    return checked.figures


def free_memory() -> None:
    """Frees what a deleted trainer held. Trainer and engine refer to each other, so this takes a garbage collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start_sides(options: ProfileOptions, settings: Sequence[str], stack: ExitStack) -> list[WorkerSide]:
    """Both sides' processes, which end with `stack`."""
    started = []
    for name in (OURS, options.against):
        started.append(start.start_side(name, settings, options.output_dir, trl_python=options.trl_python))
        stack.callback(started[-1].close)
    return started


def _half_group(config: GRPOConfig) -> list[str]:
    """Flags that draw half the completions for the same prompts."""
    size = config.num_generations
    if size % 2 or size < 4:
        raise ValueError(f"--scale halves num_generations={size}: pass an even --num_generations of 4 or more.")
    flags = {"num_generations": size}
    if config.batch_unit == "completions":
        flags["per_device_train_batch_size"] = config.per_device_train_batch_size
        if config.generation_batch_size is not None:
            flags["generation_batch_size"] = config.generation_batch_size
    return [token for name, value in flags.items() for token in (f"--{name}", str(value // 2))]


def growth_of(options: ProfileOptions, settings: Sequence[str], config: GRPOConfig, full: Comparison) -> Growth:
    """Takes the steps again with half the completions a prompt; `full` are those with all."""
    console.print(f"and again with {config.num_generations // 2} completions a prompt", highlight=False)
    with ExitStack() as stack:
        started = _start_sides(options, [*settings, *_half_group(config)], stack)
        for side in started:
            side.ready()
        half = alternate(started, warmup=options.warmup, steps=options.steps, progress=_say)
    size = config.num_generations
    return Growth.of(f"{size // 2} to {size} completions a prompt", half.steps, full.steps)


def _inside_decode(side: WorkerSide, traced: StepRecord) -> dict[str, float]:
    spans = sum(event.name == DECODE for event in traced.events)
    return side.step_inside(DECODE, every=max(spans // DECODES_WATCHED, 1)).inside


def _say(side: str, index: int, step: StepRecord) -> None:
    console.print(f"step {index + 1}  {side}: {step.seconds:.2f} s, {step.tokens} tokens", highlight=False)


def span_off_seconds(count: int = 20_000) -> float:
    """Seconds that a span takes while no recorder is active."""
    start = time.perf_counter()
    for _ in range(count):
        with span("off"):
            pass
    return (time.perf_counter() - start) / count


def _facts(
    config: GRPOConfig,
    script: ScriptArguments,
    dtype: torch.dtype,
    device: str,
    threads: int,
    steps: Sequence[StepRecord],
) -> dict[str, str]:
    work = steps[-1].work
    processor_and_threads = f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    made_with = environment(use_cpu=device != "cuda")
    return {
        "model": Path(script.model_name_or_path).name,
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_and_threads,
        "dtype": str(dtype).removeprefix("torch."),
        "step": f"{config.batch_plan.prompts_per_rollout} prompts × {config.num_generations}",
        "prompt": f"{round(sum(work.prompts) / len(work.prompts))} tokens" if work else "–",
        "completion limit": f"{config.max_completion_length} tokens",
        "beta": f"{config.beta:g}",
        "steps timed": str(len(steps)),
        **{name: value for name, value in made_with.items() if name != "hardware"},
    }


def print_report(report: ProfileReport) -> None:
    """The table for people."""
    names = list(report.sides)
    table = Table("", *names, title="a training step", title_justify="left")
    figures = report.sides.values()
    table.add_row("step time, s", *(f"{s.step_seconds.median:.3f}" for s in figures))
    table.add_row("  fastest … slowest", *(f"{s.step_seconds.low:.3f} … {s.step_seconds.high:.3f}" for s in figures))
    table.add_row("completion tokens", *(f"{s.tokens:,.0f}" for s in figures))
    table.add_row("tokens / s", *(f"{s.tokens_per_s.median:,.0f}" for s in figures))
    table.add_row("peak memory, MiB", *(f"{s.peak_bytes / 2**20:,.0f}" for s in figures))
    table.add_row("MFU", *(f"{s.utilisation.mfu:.1%}" if s.utilisation else "–" for s in figures), end_section=True)
    for phase in in_step_order(name for side in figures for name in side.phases):
        seconds = [side.phases.get(phase) for side in figures]
        table.add_row(phase, *("–" if s is None else f"{1e3 * s:,.1f} ms" for s in seconds))
    output = Terminal(soft_wrap=True)
    output.print(table)
    ratio = report.speedup
    output.print(
        f"{report.ours} is {ratio.median:.2f}× as fast as {report.theirs} ({ratio.low:.2f} … {ratio.high:.2f} turn by "
        f"turn)\nceilings measured: {report.ceilings.text}\nspans that nobody records: "
        f"{report.sides[report.ours].spans_per_step:.0f} a step × {1e9 * report.span_off_seconds:.0f} ns = "
        f"{report.span_off_share:.3%} of a step",
        highlight=False,
    )
    if report.growth:
        told = ", ".join(f"{2 ** one[WHOLE]:.2f}× for {side}" for side, one in report.growth.exponents.items())
        output.print(f"from {report.growth.doubled} a step takes {told}", highlight=False)


def _write(report: ProfileReport, comparison: Comparison, output_dir: Path) -> None:
    events = {name: step.events for name, step in comparison.traced.items()}
    write_trace(output_dir / "trace.json", events)
    steps = {
        name: [{key: value for key, value in asdict(step).items() if key != "events"} for step in one]
        for name, one in comparison.steps.items()
    }
    record = {**asdict(report), "steps": steps}
    write_aside(output_dir / "profile.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    seconds = {name: [step.seconds for step in one] for name, one in comparison.steps.items()}
    write_page(output_dir / "profile.html", report, events, seconds)
