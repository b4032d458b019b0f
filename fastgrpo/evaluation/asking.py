"""Puts questions to a model, each once, on all ranks, and keeps the answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.data.rows import Row
from fastgrpo.evaluation.answer_log import AnswerLog, Records
from fastgrpo.evaluation.ranks import Ranks
from fastgrpo.types import Completion, Engine, Prompt, RowError, SamplingParams, SkippedRow

Progress = Callable[[int, int], None]
Record = Callable[[Prompt, Completion], dict[str, Any]]
"""What is kept of an answer; values that JSON has, or bytes."""
Question = tuple[int, int]
"""Row of the words, row of the pictures."""


class Asker:
    """One model and the rows it is asked about.

    Args:
        batch_size: prompts built at a time at first, later up to four times as many: pictures are large.
        total: questions to come, for `progress`, which counts this rank's.
        log: where answers are kept while an evaluation runs, and those of an interrupted one are found.
    """

    def __init__(
        self,
        engine: Engine,
        builder: PromptBuilder,
        rows: RowDataset,
        record: Record,
        *,
        batch_size: int,
        total: int,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
        log: AnswerLog | None = None,
    ) -> None:
        self.engine = engine
        self.builder = builder
        self.rows = rows
        self.record = record
        self.batch_size = batch_size
        self.progress = progress
        self.ranks = ranks or Ranks()
        self.log = log
        self.asked = 0
        self.total = -(-total // self.ranks.count)
        self._skipped: dict[int, SkippedRow] = {}

    @property
    def skipped(self) -> tuple[SkippedRow, ...]:
        """The rows that could not be asked about, on all ranks; a collective call."""
        everywhere = self.ranks.gather(list(self._skipped.values()))
        return tuple(sorted(everywhere, key=lambda row: row.row_id))

    def ask(
        self, name: str, questions: Iterable[Question], params: SamplingParams, k: int = 1, step: int = 0
    ) -> list[Records]:
        """The answers to each question, k of them, by row; a collective call.

        Args:
            name: of this pass over the rows.
            questions: (row of the words, row of the pictures), a row's words once.
            step: enters the seeds, where answers are drawn.
        """
        kept = {} if self.log is None else self.log.kept
        mine = [question for question in questions if self.ranks.is_mine(question[0])]
        answers = {words: kept[name, words] for words, _ in mine if (name, words) in kept}
        self._count(len(answers))
        for prompts in self._built([question for question in mine if question[0] not in answers]):
            for prompt, completions in self.engine.generate(prompts, k, params, step):
                answers[prompt.row_id] = [self.record(prompt, completion) for completion in completions]
                if self.log is not None:
                    self.log.add(name, prompt.row_id, answers[prompt.row_id])
                self._count(1)
        return [
            records for _, records in sorted(self.ranks.gather(list(answers.items())), key=lambda answer: answer[0])
        ]

    def _built(self, questions: Sequence[Question]) -> Iterator[list[Prompt]]:
        """Prompts, batch by batch; while the model answers one, a thread builds the next."""
        batches = list(_batches(questions, self.batch_size))
        with ThreadPoolExecutor(max_workers=1) as thread:
            to_come = thread.submit(self._build, batches[0]) if batches else None
            for following in [*batches[1:], None]:
                if to_come is None:
                    return
                prompts, skipped = to_come.result()
                to_come = None if following is None else thread.submit(self._build, following)
                self._skipped |= {row.row_id: row for row in skipped}
                self._count(len(skipped))
                yield prompts

    def _build(self, questions: Sequence[Question]) -> tuple[list[Prompt], list[SkippedRow]]:
        prompts, skipped = [], []
        for words, pictures in questions:
            try:
                prompts.append(self.builder.build(self._question(words, pictures)))
            except RowError as error:
                skipped.append(SkippedRow(words, str(error)))
        return prompts, skipped

    def _question(self, words: int, pictures: int) -> Row:
        row = self.rows.convert(*self.rows[words])
        return row if words == pictures else replace(row, images=self.rows.convert(*self.rows[pictures]).images)

    def _count(self, answers: int) -> None:
        self.asked += answers
        if self.progress is not None and answers:
            self.progress(self.asked, self.total)


def _batches(questions: Sequence[Question], first: int) -> Iterator[Sequence[Question]]:
    """Each is twice the last, up to four times the first: the model need not wait long, nor often run empty."""
    start, size = 0, first
    while start < len(questions):
        yield questions[start : start + size]
        start, size = start + size, min(2 * size, 4 * first)
