"""Scores a model on multiple-choice questions about pictures (CV-Bench, SAT and their like).

Accuracy is told apart, so that learning a form is not mistaken for learning to see: over all questions, as a person
reads the answers and as the reward does (`figures.py`), and over those answered in the form `<think>…</think>
<answer>…</answer>`. A last figure asks the same questions about the wrong pictures: what is left of the accuracy then
came from the words.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastgrpo.atomic_files import write_aside
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.evaluation.answer_log import AnswerLog
from fastgrpo.evaluation.asking import Asker, Progress
from fastgrpo.evaluation.figures import Evaluation, Outcome, PassAtK, TaskScore, chance_of, mean
from fastgrpo.evaluation.ranks import Ranks
from fastgrpo.scoring.golds import gold_text, option_texts
from fastgrpo.scoring.reflection import count_reflections
from fastgrpo.scoring.self_correction import self_correction
from fastgrpo.types import Completion, Engine, Prompt, SamplingParams


def evaluate(
    engine: Engine,
    builder: PromptBuilder,
    rows: RowDataset,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    pass_at_k: int = 0,
    shuffles: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    log: AnswerLog | None = None,
) -> Evaluation:
    """Asks every question once, greedily.

    Args:
        max_new_tokens: most tokens in a response.
        batch_size: prompts built at a time at first, later up to four times as many.
        pass_at_k: also sample k responses a question at temperature 1; 0 for none.
        shuffles: times to ask all questions again about shuffled pictures; 0 for none.
        seed: of the sampling and of the shuffles.
        progress: called with (questions answered, questions to answer) on this rank after each.
        ranks: the processes that share the questions: all of them call this, and all get the whole evaluation.
        log: where answers are kept meanwhile; those it has are not asked for again.

    Raises:
        ValueError: no row can be used, or one has no `solution`.
    """
    rows = rows.with_checked_golds()
    greedy = SamplingParams(max_new_tokens, temperature=0.0, seed=seed)
    total = len(rows) * (1 + shuffles + (pass_at_k > 0))
    asker = Asker(
        engine, builder, rows, _record, batch_size=batch_size, total=total, progress=progress, ranks=ranks, log=log
    )
    records = [answer for (answer,) in asker.ask("greedy", [(i, i) for i in range(len(rows))], greedy)]
    if not records:
        first = asker.skipped[0]
        raise ValueError(f"none of the {len(rows)} rows can be used; row {first.row_id}: {first.reason}")
    by_task = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    usable = [record["row_id"] for record in records]
    shuffled = [
        answer
        for i in range(shuffles)
        for (answer,) in asker.ask(f"shuffled {i}", _shuffle_pictures(usable, seed + i), greedy, step=1)
    ]
    sampled = replace(greedy, temperature=1.0)
    tries = asker.ask("sampled", [(i, i) for i in usable], sampled, pass_at_k, step=2) if pass_at_k else []
    hits = [any(answer["answered"] and answer["correct_strict"] for answer in group) for group in tries]
    return Evaluation(
        total=TaskScore.of(records),
        by_task={task: TaskScore.of(group) for task, group in sorted(by_task.items())},
        mean_length=mean([record["length"] for record in records]),
        reflection_rate=mean([record["reflections"] > 0 for record in records]),
        shuffled=TaskScore.of(shuffled) if shuffled else None,
        pass_at_k=PassAtK(pass_at_k, mean(hits), chance_of([record["choices"] for record in records], pass_at_k))
        if hits
        else None,
        records=tuple(records),
        skipped=asker.skipped,
    )


def _shuffle_pictures(row_ids: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Every question with the pictures of another: one random cycle, so that none keeps its own."""
    if len(row_ids) < 2:
        return []
    order = list(row_ids)
    random.Random(seed).shuffle(order)
    return sorted(zip(order, order[1:] + order[:1], strict=True))


def _record(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    if prompt.columns.get("solution") is None:
        raise ValueError(
            f"row {prompt.row_id} has no `solution` to score against: evaluate on data with such a column."
        )
    solution, choices = prompt.columns["solution"], prompt.columns.get("choices")
    outcome = Outcome.of(prompt.text, completion.text, solution, choices)
    return {
        "row_id": prompt.row_id,
        "task": str(prompt.columns.get("task") or "all"),
        "prompt": prompt.text,
        "solution": gold_text(solution),
        "choices": 0 if choices is None else len(choices),
        "completion": completion.text,
        **outcome._asdict(),
        "length": len(completion.token_ids),
        "reflections": count_reflections(completion.text),
        "correction": self_correction(completion.text, option_texts(choices), gold_text(solution)) if choices else None,
        "thumbnail": prompt.thumbnail,
    }


def write_evaluation(evaluation: Evaluation, folder: Path, name: str, *, step: int, dataset: str) -> None:
    """Writes {name}.json (figures) and {name}.parquet (responses) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(replace(evaluation, name=name, step=step, dataset=dataset).to_json(), indent=2)
    table = pa.Table.from_pylist(list(evaluation.records))
    write_aside(folder / f"{name}.parquet", lambda path: pq.write_table(table, path, compression="zstd"))
    write_aside(folder / f"{name}.json", lambda path: path.write_text(figures + "\n"))
