"""`fastgrpo eval`: greedy accuracy of one model, or of several on the same questions."""

from __future__ import annotations

import gc
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo import __version__
from fastgrpo.cli.console import progress_of, say
from fastgrpo.cli.eval_flags import Target, read_flags
from fastgrpo.cli.options import require_no_splits, require_writable

if TYPE_CHECKING:
    from fastgrpo.cli.inference import Inference
    from fastgrpo.cli.scoring import Scoring
    from fastgrpo.data.row_dataset import RowDataset
    from fastgrpo.evaluation import Ranks
    from fastgrpo.evaluation.answer_log import AnswerLog


def run(argv: Sequence[str]) -> None:
    """Scores the models as the flags say, prints the figures and writes them."""
    options, target = read_flags(argv)
    labels = labels_of(target.models)
    require_writable(options.output_dir)
    if target.data is not None:
        require_no_splits(target.data, ["--split"] if options.split else [])

    from fastgrpo.cli.launched import join_ranks
    from fastgrpo.cli.quiet import quieten
    from fastgrpo.model.load import load_processing

    quieten()
    for model in target.models[1:]:  # a wrong name should not wait until the models before it are scored
        load_processing(model, options.min_pixels, options.max_pixels, options.trust_remote_code)
    ranks, options.device = join_ranks(options.device)
    scoring = scoring_of(target, options)
    rows = load(target, options)
    found, logs = {}, []
    for label, model in zip(labels, target.models, strict=True):
        name = target.name if len(labels) == 1 else f"{target.name}-{in_file_names(label)}"
        answers, log = ask(model, rows, options, ranks, scoring, options.output_dir / "evals" / f".{name}.answers")
        logs.append(log)
        if ranks.is_main:
            found[label] = scoring.write(answers, name)
    if ranks.is_main:
        say(f"page: {scoring.finish(found)}")
        for log in logs:
            log.remove()


def scoring_of(target: Target, options: Namespace) -> Scoring:
    """What is made of the answers."""
    from fastgrpo.cli.scoring import AccuracyScoring, RefusalScoring

    kind = RefusalScoring if target.benchmark == "mossbench" else AccuracyScoring
    return kind(target, options)


def load(target: Target, options: Namespace) -> RowDataset:
    """The questions."""
    from fastgrpo.data.benchmarks import load_benchmark, with_pictures
    from fastgrpo.data.loading import load_rows

    if target.benchmark is None:
        assert target.data is not None
        splits = options.split or ("test", "validation", "val")
        rows = load_rows(target.data, split=splits, max_samples=options.max_samples, seed=options.seed)
        rows.folders = with_pictures(options.pictures, rows.folders)
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
    parts = [Path(os.path.abspath(model) if os.path.isdir(model) else model).parts for model in models]
    if twice := [model for model, one in zip(models, parts, strict=True) if parts.count(one) > 1]:
        raise ValueError(f"{twice[-1]} is named twice")
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-length:]) for one in parts]
        if len(set(map(in_file_names, labels))) == len(labels):
            return labels
    return list(models)


def in_file_names(label: str) -> str:
    """What names of a model's files have for its label."""
    return label.replace("/", "-")


def ask(
    model: str, rows: RowDataset, options: Namespace, ranks: Ranks, scoring: Scoring, folder: Path
) -> tuple[Any, AnswerLog]:
    """What one model says, and where it is kept until all models are scored."""
    from fastgrpo.cli.inference import load_inference
    from fastgrpo.evaluation.answer_log import AnswerLog

    loaded = load_inference(Namespace(**vars(options), model=model), max_rows=options.batch_size)
    log = AnswerLog(folder, key(model, loaded, rows, options), ranks)
    if log.kept:
        say(f"{len(log.kept)} answers of an interrupted evaluation are kept ({folder})")
    with progress_of(f"scoring {model}") as progress:
        answers = scoring.ask(loaded, rows, progress=progress, ranks=ranks, log=log)
    log.close()
    del loaded
    gc.collect()  # the next model gets this one's memory
    return answers, log


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
        "rows": [rows.schema, len(rows), list(map(str, rows.folders or ())), sorted(rows.files)],
        "engine": type(loaded.engine).__name__,
        **asked,
        **pixels,
        **loaded.prompts,
    }
