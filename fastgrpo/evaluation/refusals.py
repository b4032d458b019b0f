"""A model on MOSSBench: its answers, what was judged of each, and the files they are kept in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastgrpo.atomic_files import write_aside
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.evaluation.answer_log import AnswerLog
from fastgrpo.evaluation.asking import Asker, Progress
from fastgrpo.evaluation.judge import Judge
from fastgrpo.evaluation.mossbench import MossBench, score_refusals
from fastgrpo.evaluation.ranks import Ranks
from fastgrpo.scoring.answers import parse_answer
from fastgrpo.types import Completion, Engine, Prompt, SamplingParams, SkippedRow


@dataclass(frozen=True)
class FreeAnswers:
    """What a model says to questions that have no gold answer."""

    records: tuple[dict[str, Any], ...]
    """One per question, with the columns of its row."""
    skipped: tuple[SkippedRow, ...] = ()


@dataclass(frozen=True)
class RefusalEvaluation:
    """The answers, judged."""

    answers: FreeAnswers
    figures: MossBench

    @property
    def refusals(self) -> dict[int, bool]:
        """Row of each judged benign question → whether its answer is a refusal."""
        pairs = zip(self.answers.records, self.figures.verdicts, strict=True)
        return {one["row_id"]: verdict.refused for one, verdict in pairs if verdict is not None and not one["contrast"]}


def ask_freely(
    engine: Engine,
    builder: PromptBuilder,
    rows: RowDataset,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    log: AnswerLog | None = None,
) -> FreeAnswers:
    """Asks every question once, greedily; arguments as of `evaluate`.

    Raises:
        ValueError: no row can be used.
    """
    asker = Asker(
        engine, builder, rows, _record, batch_size=batch_size, total=len(rows), progress=progress, ranks=ranks, log=log
    )
    greedy = SamplingParams(max_new_tokens, temperature=0.0, seed=seed)
    records = tuple(answer for (answer,) in asker.ask("greedy", [(i, i) for i in range(len(rows))], greedy))
    skipped = asker.skipped
    if not records:
        raise ValueError(f"none of the {len(rows)} rows can be used; row {skipped[0].row_id}: {skipped[0].reason}")
    return FreeAnswers(records, skipped)


def judge_answers(answers: FreeAnswers, judge: Judge | None = None, seed: int = 0) -> RefusalEvaluation:
    """Judges what a reader sees of each answer: what stands in its tags, else what is behind the reasoning."""
    texts = [_shown(record["completion"]) for record in answers.records]
    return RefusalEvaluation(answers, score_refusals(answers.records, texts, judge, seed=seed))


def _shown(completion: str) -> str:
    return parse_answer(completion) or completion.rpartition("</think>")[2]


def _record(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    return {
        "row_id": prompt.row_id,
        "prompt": prompt.text,
        **prompt.columns,
        "completion": completion.text,
        "length": len(completion.token_ids),
        "thumbnail": prompt.thumbnail,
    }


def write_refusals(evaluation: RefusalEvaluation, folder: Path, name: str, *, dataset: str) -> None:
    """Writes {name}.json (figures) and {name}.parquet (answers and verdicts) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = evaluation.answers
    figures = {
        "name": name,
        "dataset": dataset,
        "num_questions": len(answers.records),
        "skipped": [asdict(row) for row in answers.skipped],
        **evaluation.figures.to_json(),
    }
    table = pa.Table.from_pylist(_with_verdicts(evaluation))
    write_aside(folder / f"{name}.parquet", lambda path: pq.write_table(table, path, compression="zstd"))
    write_aside(folder / f"{name}.json", lambda path: path.write_text(json.dumps(figures, indent=2) + "\n"))


def _with_verdicts(evaluation: RefusalEvaluation) -> Sequence[dict[str, Any]]:
    pairs = zip(evaluation.answers.records, evaluation.figures.verdicts, strict=True)
    return [
        {**record, "refused": verdict and verdict.refused, "stage": verdict and verdict.stage}
        for record, verdict in pairs
    ]
