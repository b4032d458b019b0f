"""`fastgrpo eval`: greedy accuracy of one model, or of several on the same questions."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo import __version__
from fastgrpo.cli.console import progress_of, say
from fastgrpo.cli.eval_flags import Target, read_flags
from fastgrpo.cli.options import require_no_splits, require_writable

if TYPE_CHECKING:
    from rich.console import Console

    from fastgrpo.cli.inference import Inference
    from fastgrpo.data.row_dataset import RowDataset
    from fastgrpo.evaluation import Evaluation, Ranks
    from fastgrpo.evaluation.answer_log import AnswerLog
    from fastgrpo.evaluation.comparison import Comparison


def run(argv: Sequence[str]) -> None:
    """Scores the models as the flags say, prints the figures and writes them."""
    options, target = read_flags(argv)
    require_writable(options.output_dir)
    if target.data is not None:
        require_no_splits(target.data, ["--split"] if options.split else [])

    from fastgrpo.cli.launched import join_ranks
    from fastgrpo.cli.quiet import quieten
    from fastgrpo.evaluation import write_evaluation
    from fastgrpo.evaluation.comparison import compare
    from fastgrpo.report.comparison import write_comparison

    quieten()
    ranks, options.device = join_ranks(options.device)
    labels = labels_of(target.models)
    rows = load(target, options)
    folder, evaluations, logs = options.output_dir / "evals", {}, []
    for label, model in zip(labels, target.models, strict=True):
        name = target.name if len(labels) == 1 else f"{target.name}-{label.replace('/', '-')}"
        evaluation, log = score(model, rows, options, ranks, folder / f".{name}.answers")
        logs.append(log)
        evaluations[label] = evaluation
        if ranks.is_main:
            write_evaluation(evaluation, folder, name, step=0, dataset=target.dataset)
    if ranks.is_main:
        comparison = compare(evaluations, options.seed)
        page = write_comparison(comparison, options.output_dir, target.name, title=target.title, dataset=target.dataset)
        show(comparison)
        say(f"page: {page}")
        for log in logs:
            log.remove()


def load(target: Target, options: Namespace) -> RowDataset:
    """The questions."""
    from fastgrpo.data.benchmarks import load_benchmark
    from fastgrpo.data.loading import load_rows

    if target.benchmark is None:
        assert target.data is not None
        splits = options.split or ("test", "validation", "val")
        rows = load_rows(target.data, split=splits, max_samples=options.max_samples, seed=options.seed)
        rows.folder = options.pictures or rows.folder
        return rows
    return load_benchmark(
        target.benchmark,
        target.data,
        split=options.split,
        pictures=options.pictures,
        max_samples=options.max_samples,
        seed=options.seed,
    )


def labels_of(models: Sequence[str]) -> list[str]:
    """Short names that tell the models apart: the ends of their paths, as long as they need to be.

    Raises:
        ValueError: a model is named twice.
    """
    if twice := [model for model, count in Counter(models).items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    parts = [Path(model).parts for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-length:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(models)


def score(
    model: str, rows: RowDataset, options: Namespace, ranks: Ranks, answers: Path
) -> tuple[Evaluation, AnswerLog]:
    """One model's evaluation, and where its answers are kept until all models are scored."""
    from fastgrpo.cli.inference import load_inference
    from fastgrpo.evaluation import evaluate
    from fastgrpo.evaluation.answer_log import AnswerLog

    loaded = load_inference(Namespace(**vars(options), model=model), max_rows=options.batch_size)
    log = AnswerLog(answers, key(model, loaded, rows, options), ranks)
    if log.kept:
        say(f"{len(log.kept)} answers of an interrupted evaluation are kept ({answers})")
    with progress_of(f"scoring {model}") as progress:
        evaluation = evaluate(
            loaded.engine,
            loaded.builder,
            rows,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            pass_at_k=options.pass_at_k,
            shuffles=options.shuffles,
            seed=options.seed,
            progress=progress,
            ranks=ranks,
            log=log,
        )
    log.close()
    del loaded
    gc.collect()  # the next model gets this one's memory
    return evaluation, log


def key(model: str, loaded: Inference, rows: RowDataset, options: Namespace) -> dict[str, Any]:
    """All that answers depend on."""
    from fastgrpo.model.adapters import adapter_base

    places = [place for place in (model, adapter_base(model)) if place]
    files = [f for place in places for name in ("*.safetensors", "*config.json") for f in Path(place).glob(name)]
    weights = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    asked = {name: getattr(options, name) for name in ("max_new_tokens", "pass_at_k", "seed", "dtype")}
    pixels = {name: getattr(options, name) for name in ("min_pixels", "max_pixels")}
    return {
        "version": __version__,
        "model": [model, weights],
        "rows": [rows.schema, len(rows), str(rows.folder), sorted(rows.files)],
        "engine": type(loaded.engine).__name__,
        **asked,
        **pixels,
        **loaded.prompts,
    }


def show(comparison: Comparison) -> None:
    """The tables for people."""
    from rich.console import Console

    console = Console()
    if len(comparison.evaluations) == 1:
        ((_, evaluation),) = comparison.evaluations.items()
        print_evaluation(evaluation, console)
    else:
        print_comparison(comparison, console)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """One model's figures."""
    from rich.table import Table

    table = Table("task", "questions", "accuracy", "strict", "unreadable", "answered", "accuracy of answered", "chance")
    for task, score in [*evaluation.by_task.items(), ("total", evaluation.total)]:
        rates = [score.accuracy, score.accuracy_strict, score.unreadable_rate]
        rates += [score.answered_rate, score.answered_accuracy, score.chance]
        table.add_row(task, str(score.count), *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    console.print(table)
    if evaluation.answered_accuracy_shuffled_images is not None:
        console.print(f"accuracy of answered, pictures shuffled: {evaluation.answered_accuracy_shuffled_images:.1%}")
    if evaluation.pass_at_k:
        chance = evaluation.pass_at_k.chance
        guessing = "" if chance is None else f" (guessing: {chance:.1%})"
        console.print(f"pass@{evaluation.pass_at_k.k}: {evaluation.pass_at_k.value:.1%}{guessing}")
    print_skipped(evaluation, console)


def print_skipped(evaluation: Evaluation, console: Console) -> None:
    """The rows that could not be asked about."""
    for row in evaluation.skipped:
        console.print(f"row {row.row_id} skipped: {row.reason}", highlight=False, soft_wrap=True, markup=False)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Several models' accuracies, and how they differ."""
    from rich.table import Table

    names = list(comparison.evaluations)
    table = Table("task", "questions", *names, title="accuracy, 95 % intervals", title_justify="left")
    for task, row in [*comparison.by_task.items(), ("total", comparison.total)]:
        cells = [f"{row[name].text}" if name in row else "–" for name in names]
        table.add_row(task, str(max(one.count for one in row.values())), *cells)
    totals = [one.total for one in comparison.evaluations.values()]
    for label, rates in {
        "by the reward's grader": [total.accuracy_strict for total in totals],
        "no option readable": [total.unreadable_rate for total in totals],
    }.items():
        table.add_row(label, "", *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    console.print(table)
    for test in comparison.tests:
        console.print(test.text, highlight=False, soft_wrap=True, markup=False)
    for name, evaluation in comparison.evaluations.items():
        if evaluation.skipped:
            console.print(f"{name}:", highlight=False, markup=False)
            print_skipped(evaluation, console)
