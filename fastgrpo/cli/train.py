"""`fastgrpo train`: score the base, train, score again, sum up, draw the report."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgrpo.atomic_files import write_aside
from fastgrpo.cli.arguments import parse
from fastgrpo.cli.assembly import build_trainer, load_held_out, load_test_split, load_training_rows
from fastgrpo.cli.banner import banner
from fastgrpo.cli.console import progress_lines, say
from fastgrpo.cli.launch import launch
from fastgrpo.cli.options import require_writable
from fastgrpo.cli.quiet import quieten
from fastgrpo.cli.run_arguments import RunArguments
from fastgrpo.cli.train_help import TRAIN, asked_for_help
from fastgrpo.data.row_dataset import RowDataset, warn_of_shared_rows
from fastgrpo.evaluation import Ranks, evaluate, write_evaluation
from fastgrpo.report.finish import finish_run
from fastgrpo.safe_text.redaction import redacted
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.training.checkpoints import find_checkpoint
from fastgrpo.training.rank_watch import watched_ranks
from fastgrpo.training.run_trainer import RunTrainer


def run(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    if asked_for_help(argv, TRAIN) or launch("train", argv):
        return
    quieten()
    config, script = parse(argv)
    resumable(config, lambda: run_training(config, script))


def resumable(config: RunConfig, train: Callable[[], Any]) -> None:
    """Runs `train`; tells whoever interrupts it how to go on."""
    try:
        train()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_resume(config)) from None


def run_training(config: RunConfig, script: RunArguments, build: Callable[..., Any] = build_trainer) -> dict[str, Any]:
    """Trains as `fastgrpo train` does; returns what summary.json holds (on the main process).

    Args:
        build: makes the trainer, as `assembly.build_trainer` does.

    Raises:
        ValueError: a setting, a file or a data set that cannot work; the message says how to mend it.
    """
    with watched_ranks(config.ddp_timeout):
        return _run_training(config, script, build)


def _run_training(config: RunConfig, script: RunArguments, build: Callable[..., Any]) -> dict[str, Any]:
    start = time.perf_counter()
    output_dir = Path(config.output_dir)
    if config.eval_strategy != "no" and script.eval_dataset_name is None and Path(script.dataset_name).is_file():
        raise ValueError(f"eval_strategy={str(config.eval_strategy.value)!r} needs rows: set eval_dataset_name.")
    if config.load_best_model_at_end and config.eval_strategy == "no":
        raise ValueError("load_best_model_at_end=True needs evaluations to choose by: set eval_strategy.")
    require_writable(output_dir)
    rows, held_out = load_training_rows(script, config.seed), load_held_out(script, config.seed)
    eval_rows = None if config.eval_strategy == "no" else held_out or load_test_split(script, config.seed)
    trainer: RunTrainer = build(config, script, rows, eval_rows=eval_rows)
    trainer.get_train_dataloader()  # a data set smaller than a rollout is told now, not after the first scoring
    if trainer.is_world_process_zero():
        for line in banner(trainer, script):
            say(line)
        if held_out is not None and config.eval_strategy == "no":  # else the trainer has looked
            warn_of_shared_rows(rows, held_out)
    with nullcontext() if trainer.run_log is None else trainer.run_log.lock.held():
        train_between_scores(trainer, script, held_out)
        if trainer.run_log is None:
            return {}
        summary = finish_run(output_dir, seed=config.seed, wall_s=time.perf_counter() - start)
        trainer.write_card(output_dir, summary.scores())
    say(f"summary: {output_dir / 'summary.json'}\nreport:  {output_dir / 'report.html'}")
    return summary.to_json()


def train_between_scores(trainer: RunTrainer, script: RunArguments, held_out: RowDataset | None) -> None:
    """Scores the base on the held-out rows, trains, saves, scores again; without such rows, trains and saves."""
    config, output_dir = trainer.config, Path(trainer.config.output_dir)
    resuming = trainer.checkpoint_to_resume(config.resume_from_checkpoint) is not None
    if trainer.run_log is not None:
        if not resuming:
            trainer.run_log.start_over()
        write_aside(output_dir / "settings.json", lambda path: path.write_text(_settings_json(trainer, script)))
    # What the main process finds: nodes may have disks of their own.
    has_before, *_ = _ranks(trainer).gather([(output_dir / "evals" / "before.json").exists()])
    if held_out is not None:
        trainer.engine.sync()  # all ranks: weights may lie in pieces on all of them
    if held_out is not None and not (resuming and has_before):
        _score(trainer, script, held_out, "before", pass_at_k=script.eval_pass_at_k, shuffles=0)
    trainer.accelerator.wait_for_everyone()
    trainer.train()
    trainer.save_model(config.output_dir)
    if held_out is not None:
        trainer.engine.sync()
        _score(trainer, script, held_out, "after", pass_at_k=0, shuffles=script.eval_shuffles)


def how_to_resume(config: RunConfig) -> str:
    """What to tell whoever interrupted a run."""
    try:
        checkpoint = find_checkpoint("last", Path(config.output_dir))
    except ValueError:  # saved with save_only_model
        return "its checkpoints hold no optimizer state (save_only_model), so the run cannot be continued"
    if checkpoint is None:
        return f"no checkpoint was saved yet: pass --save_steps, the steps between two (now {config.save_steps:g})"
    return f"the same command with --resume_from_checkpoint continues from {checkpoint}"


def _score(
    trainer: RunTrainer, script: RunArguments, rows: RowDataset, name: str, *, pass_at_k: int, shuffles: int
) -> None:
    """Scores the model as it is, on all ranks, and writes evals/{name}.json and .parquet."""
    is_main = trainer.is_world_process_zero()
    evaluation = evaluate(
        trainer.engine,
        trainer.builder,
        rows,
        max_new_tokens=script.eval_max_new_tokens,
        batch_size=trainer.config.per_device_eval_batch_size,
        pass_at_k=pass_at_k,
        shuffles=shuffles,
        seed=trainer.config.seed,
        progress=progress_lines(f"scoring {name} training") if is_main else None,
        ranks=_ranks(trainer),
    )
    if is_main:
        folder, step = Path(trainer.config.output_dir) / "evals", trainer.state.global_step
        write_evaluation(evaluation, folder, name, step=step, dataset=str(script.eval_dataset_name))


def _ranks(trainer: RunTrainer) -> Ranks:
    return Ranks(trainer.accelerator.process_index, trainer.accelerator.num_processes)


def _settings_json(trainer: RunTrainer, script: RunArguments) -> str:
    run_id = {} if trainer.run_log is None else {"run_id": trainer.run_log.run_id()}
    return json.dumps(redacted({**trainer.config.to_dict(), **asdict(script), **run_id}), indent=2, default=str) + "\n"
