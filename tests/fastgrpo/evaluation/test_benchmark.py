import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.data.rows import Row
from fastgrpo.evaluation import Evaluation, Ranks, evaluate, write_evaluation
from fastgrpo.evaluation.answer_log import AnswerLog
from fastgrpo.types import Completion, Prompt, Rollout, RowError, SamplingParams

Script = Callable[[Prompt, int], str]
"""What is said to a prompt, as the completion of some index."""


class Builder:
    """Prompts that remember whose pictures they show."""

    def __init__(self, rows: RowDataset, bad: Sequence[int] = ()) -> None:
        self.bad = bad
        self.owner = {self.pixels(rows.convert(*rows[i])): i for i in range(len(rows))}

    def pixels(self, row: Row) -> bytes:
        return b"".join(image.tobytes() for image in row.images)

    def build(self, row: Row) -> Prompt:
        if row.row_id in self.bad:
            raise RowError("a bad row")
        ids = torch.arange(3)
        columns = {**row.columns, "pictures_of": self.owner[self.pixels(row)]}
        return Prompt(row.row_id, ids, ids.expand(3, -1), None, None, "<think>", None, columns, b"jpeg")


class Engine:
    """Says what a script says, and remembers what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[tuple[Prompt, int, SamplingParams]] = []

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        for prompt in reversed(prompts):  # in any order
            self.asked.append((prompt, num_generations, params))
            texts = [self.script(prompt, i) for i in range(num_generations)]
            yield prompt, tuple(self.completion(prompt, i, text) for i, text in enumerate(texts))

    def completion(self, prompt: Prompt, index: int, text: str) -> Completion:
        nothing = torch.zeros(len(text))
        return Completion(prompt.row_id, index, nothing.long(), text, "stop", nothing, nothing)


def tagged(answer: str) -> str:
    return f"Let me see.</think> <answer>{answer}</answer>"


def gold(prompt: Prompt) -> str:
    return prompt.columns["solution"]


def wrong(prompt: Prompt) -> str:
    return next(f"({letter})" for letter in string.ascii_uppercase if f"({letter})" != gold(prompt))


@pytest.fixture
def rows(cvbench_file: Path) -> RowDataset:
    return load_rows(str(cvbench_file))


@pytest.fixture
def run(rows: RowDataset) -> Any:
    def score(script: Script, bad: Sequence[int] = (), **settings: Any) -> tuple[Evaluation, Engine]:
        engine = Engine(script)
        builder = cast(PromptBuilder, Builder(rows, bad))
        return evaluate(engine, builder, rows, max_new_tokens=64, **settings), engine

    return score


def test_every_question_is_asked_once_and_greedily(rows: RowDataset, run: Any) -> None:
    evaluation, engine = run(lambda prompt, _: tagged(gold(prompt)), batch_size=7)
    assert sorted(prompt.row_id for prompt, _, _ in engine.asked) == list(range(24))
    assert {(k, params.temperature, params.max_new_tokens) for _, k, params in engine.asked} == {(1, 0.0, 64)}
    assert all(prompt.columns["pictures_of"] == prompt.row_id for prompt, _, _ in engine.asked)
    assert [record["row_id"] for record in evaluation.records] == list(range(24))
    assert (evaluation.total.accuracy, evaluation.total.answered_accuracy, evaluation.total.answered_rate) == (1, 1, 1)
    assert evaluation.shuffled is None
    assert evaluation.pass_at_k is None


def test_two_graders_and_the_answered(run: Any) -> None:
    """Of 24: 4 each right and wrong in the form, right without it, right and wrong in free text, and unreadable."""

    def script(prompt: Prompt, _: int) -> str:
        kinds = [tagged(gold(prompt)), tagged(wrong(prompt)), gold(prompt)]
        kinds += [f"I think it is {gold(prompt)}, there.", f"So it is {wrong(prompt)} that I see.", "I cannot tell."]
        return kinds[prompt.row_id % 6]

    evaluation, _ = run(script)
    total = evaluation.total
    assert (total.count, total.accuracy, total.accuracy_strict) == (24, 12 / 24, 8 / 24)
    assert (total.unreadable_rate, total.answered_rate, total.answered_accuracy) == (4 / 24, 8 / 24, 0.5)
    assert [record["correct"] for record in evaluation.records] == [True, False, True, True, False, False] * 4
    assert [record["correct_strict"] for record in evaluation.records] == [True, False, True, False, False, False] * 4
    assert [record["reading"] is None for record in evaluation.records] == [*[False] * 5, True] * 4
    assert [record["answered"] for record in evaluation.records] == [True, True, False, False, False, False] * 4
    assert evaluation.mean_length == sum(record["length"] for record in evaluation.records) / 24


def test_scores_by_task(rows: RowDataset, run: Any) -> None:
    tasks = [rows.convert(*rows[i]).columns["task"] for i in range(24)]
    choices = [len(rows.convert(*rows[i]).columns["choices"]) for i in range(24)]
    assert len(set(tasks)) > 2
    evaluation, _ = run(lambda prompt, _: tagged((gold if prompt.columns["task"] == "Count" else wrong)(prompt)))
    assert list(evaluation.by_task) == sorted(set(tasks))
    for task, score in evaluation.by_task.items():
        mine = [1 / n for n, other in zip(choices, tasks, strict=True) if other == task]
        assert (score.count, score.accuracy, score.answered_accuracy) == (len(mine), task == "Count", task == "Count")
        assert score.chance == pytest.approx(sum(mine) / len(mine))
    assert evaluation.total.chance == pytest.approx(sum(1 / n for n in choices) / 24)
    assert evaluation.total.accuracy == tasks.count("Count") / 24


@pytest.mark.parametrize(
    ("wrap", "correct", "strict", "answered"),
    [
        ("{}", True, True, False),
        (" {}.\n", True, True, False),
        ("The answer is {}", True, True, False),
        ("{} because it is nearer", True, False, False),
        ("", False, False, False),
        ("x</think> <answer>{}</answer>", True, True, True),
        ("x</think> <answer>{}</answer>\n", True, True, True),
        ("x <answer>{}</answer>", True, True, False),  # no end of the thought
        ("x</think> <answer>{}</answer> indeed", True, True, False),
        ("x</think> <answer>{}</answer> <answer>{}</answer>", True, False, False),
        ("x</think> <answer>it is {}</answer>", True, False, True),
        ("x</think> <answer></answer>", False, False, True),
        ("{}</think> <answer>none of them</answer>", False, False, True),
    ],
)
def test_what_counts_as_correct_and_as_answered(
    run: Any, wrap: str, correct: bool, strict: bool, answered: bool
) -> None:
    evaluation, _ = run(lambda prompt, _: wrap.replace("{}", gold(prompt)))
    assert {record["correct"] for record in evaluation.records} == {correct}
    assert {record["correct_strict"] for record in evaluation.records} == {strict}
    assert {record["answered"] for record in evaluation.records} == {answered}
    assert evaluation.total.answered_accuracy == (float(strict) if answered else None)


def test_an_article_is_no_option(run: Any) -> None:
    evaluation, _ = run(lambda prompt, _: "a picture of a thing")
    assert evaluation.total.accuracy == 0


def test_shuffled_pictures_are_always_another_rows(run: Any) -> None:
    """A model that looks: right where the picture is the question's own."""

    def looks(prompt: Prompt, _: int) -> str:
        return tagged((gold if prompt.columns["pictures_of"] == prompt.row_id else wrong)(prompt))

    evaluation, engine = run(looks, shuffles=3, seed=5)
    asked = [(prompt.row_id, prompt.columns["pictures_of"]) for prompt, _, _ in engine.asked[24:]]
    assert len(asked) == 3 * 24
    assert all(words != pictures for words, pictures in asked)
    for i in range(3):
        once = sorted(asked[i * 24 : (i + 1) * 24])
        assert [words for words, _ in once] == list(range(24))
        assert sorted(pictures for _, pictures in once) == list(range(24))
    assert sorted(asked[:24]) != sorted(asked[24:48])
    assert (evaluation.total.accuracy, evaluation.shuffled.answered_accuracy, evaluation.shuffled.count) == (1, 0, 72)


def test_shuffling_keeps_words_and_options(run: Any) -> None:
    """A model that guesses from the words scores the same on shuffled pictures."""
    evaluation, _ = run(lambda prompt, _: tagged(gold(prompt)), shuffles=1)
    assert evaluation.shuffled.answered_accuracy == 1


def test_one_question_alone_has_no_other_pictures(rows: RowDataset, run: Any) -> None:
    evaluation, engine = run(lambda prompt, _: tagged(gold(prompt)), bad=range(1, 24), shuffles=2)
    assert evaluation.shuffled is None
    assert len(engine.asked) == 1


def test_pass_at_k_wants_one_of_k_right_in_the_form(run: Any) -> None:
    """Sampled: a third of the rows right at the last try, a third right but untagged, a third never."""

    def script(prompt: Prompt, index: int) -> str:
        if index < 3:
            return tagged(wrong(prompt))
        return [tagged(gold(prompt)), gold(prompt), "no"][prompt.row_id % 3]

    evaluation, engine = run(script, pass_at_k=4)
    options = [record["choices"] for record in evaluation.records]
    guessing = sum(1 - (1 - 1 / n) ** 4 for n in options) / len(options)
    assert evaluation.pass_at_k == (4, pytest.approx(1 / 3), pytest.approx(guessing))
    assert evaluation.total.accuracy == 0
    sampled = [(k, params.temperature) for _, k, params in engine.asked[24:]]
    assert sampled == [(4, 1.0)] * 24


def test_bad_rows_are_named_and_left_out(run: Any) -> None:
    evaluation, _ = run(lambda prompt, _: tagged(gold(prompt)), bad=[3, 20], shuffles=1, pass_at_k=2)
    assert [(row.row_id, row.reason) for row in evaluation.skipped] == [(3, "a bad row"), (20, "a bad row")]
    assert (evaluation.total.count, evaluation.shuffled.count) == (22, 22)
    assert evaluation.total.accuracy == 1


def test_no_usable_row(run: Any) -> None:
    with pytest.raises(ValueError, match="none of the 24 rows can be used; row 0: a bad row"):
        run(lambda prompt, _: "", bad=range(24))


def test_rows_without_a_solution_cannot_be_scored(rows: RowDataset) -> None:
    class WithoutSolution(Builder):
        def build(self, row: Row) -> Prompt:
            return super().build(replace(row, columns={"choices": ["a", "b"]}))

    with pytest.raises(ValueError, match="row 0 has no `solution`"):
        evaluate(
            Engine(lambda prompt, _: ""),
            cast(PromptBuilder, WithoutSolution(rows)),
            rows,
            max_new_tokens=1,
            batch_size=1,
        )


def test_progress_counts_every_question(run: Any) -> None:
    calls: list[tuple[int, int]] = []
    run(
        lambda prompt, _: "",
        batch_size=10,
        shuffles=1,
        pass_at_k=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 72) for done in range(1, 73)]


class KilledError(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_where_it_was(rows: RowDataset, tmp_path: Path) -> None:
    """Interrupted twice, the second time among sampled answers; the same figures, and no answer is asked for twice."""

    def script(prompt: Prompt, index: int) -> str:
        return tagged((gold if (prompt.row_id + index) % 3 else wrong)(prompt))

    def answer_until(count: int, log: AnswerLog | None) -> tuple[Evaluation | None, Engine]:
        def script_until(prompt: Prompt, index: int) -> str:
            if len(engine.asked) > count:
                raise KilledError
            return script(prompt, index)

        engine = Engine(script_until)
        try:
            builder = cast(PromptBuilder, Builder(rows, bad=[4]))
            settings: dict[str, Any] = {"shuffles": 2, "pass_at_k": 2, "batch_size": 5}
            return evaluate(engine, builder, rows, max_new_tokens=8, log=log, **settings), engine
        except KilledError:
            return None, engine

    whole, _ = answer_until(1000, None)
    asked = []
    for count in (10, 70, 1000):
        found, engine = answer_until(count, AnswerLog(tmp_path / "answers", {"seed": 0}))
        asked.append(len(engine.asked))
    assert found == whole
    assert asked == [11, 71, 4 * 23 - 10 - 70]


def test_ranks_share_the_questions(rows: RowDataset) -> None:
    """Each asks its own, and both end with the same figures: here one after the other, what is gathered handed on."""

    @dataclass(frozen=True)
    class Recorded(Ranks):
        """Stands in for two processes: the first run records what a rank hands out, the second reads it."""

        shared: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
        calls: list[int] = field(default_factory=list)

        def gather(self, mine: list[Any]) -> list[Any]:
            self.calls.append(0)
            self.shared[self.index, len(self.calls)] = mine
            return [one for rank in range(2) for one in self.shared.get((rank, len(self.calls)), [])]

    shared: dict[tuple[int, int], list[Any]] = {}

    def run(index: int) -> tuple[Evaluation, Engine]:
        engine = Engine(lambda prompt, _: tagged((gold if prompt.row_id % 3 else wrong)(prompt)))
        builder = cast(PromptBuilder, Builder(rows, bad=[4, 5]))
        return evaluate(engine, builder, rows, max_new_tokens=8, ranks=Recorded(index, 2, shared)), engine

    _, first = run(0)
    both, second = run(1)
    alone = evaluate(
        Engine(lambda prompt, _: tagged((gold if prompt.row_id % 3 else wrong)(prompt))),
        cast(PromptBuilder, Builder(rows, bad=[4, 5])),
        rows,
        max_new_tokens=8,
    )
    assert both == alone
    assert sorted(p.row_id for p, _, _ in first.asked) == [i for i in range(0, 24, 2) if i != 4]
    assert sorted(p.row_id for p, _, _ in second.asked) == [i for i in range(1, 24, 2) if i != 5]


def test_without_options_there_is_no_guessing(rows: RowDataset) -> None:
    class WithoutOptions(Builder):
        def build(self, row: Row) -> Prompt:
            return super().build(replace(row, columns={"task": "t", "solution": "7"}))

    engine, builder = Engine(lambda prompt, _: tagged("7")), cast(PromptBuilder, WithoutOptions(rows))
    evaluation = evaluate(engine, builder, rows, max_new_tokens=1, pass_at_k=2)
    total = evaluation.total
    assert (total.chance, evaluation.by_task["t"].chance) == (None, None)
    assert (total.accuracy, total.accuracy_strict, total.unreadable_rate) == (1, 1, 0)
    assert evaluation.pass_at_k == (2, 1.0, None)


def test_files_from_before_answers_were_read() -> None:
    total = Evaluation.read("", {"chance": 0.0, "num_questions": 3, "accuracy": 0.25}).total
    assert (total.chance, total.count, total.accuracy, total.accuracy_strict) == (None, 3, None, 0.25)


def test_reflection_rate(run: Any) -> None:
    texts = ["Wait, let me check that again.", "It is the red one."]
    evaluation, _ = run(lambda prompt, _: texts[prompt.row_id % 2])
    assert evaluation.reflection_rate == 0.5


def test_written_files(run: Any, tmp_path: Path) -> None:
    evaluation, _ = run(
        lambda prompt, _: tagged(gold(prompt)) if prompt.row_id < 12 else "no", bad=[23], shuffles=1, pass_at_k=2
    )
    write_evaluation(evaluation, tmp_path / "evals", "before", step=7, dataset="cv.parquet")
    figures = json.loads((tmp_path / "evals" / "before.json").read_text())
    assert figures["accuracy"] == pytest.approx(12 / 23)
    assert (figures["name"], figures["step"], figures["dataset"], figures["num_questions"]) == (
        "before", 7, "cv.parquet", 23,
    )  # fmt: skip
    assert (figures["answered_accuracy"], figures["answered_accuracy_shuffled_images"]) == (1, 1)
    assert figures["pass_at_k"] == {"k": 2, "value": pytest.approx(12 / 23), "chance": evaluation.pass_at_k.chance}
    assert figures["skipped"] == [{"row_id": 23, "reason": "a bad row"}]
    assert set(figures["accuracy_by_task"]["Count"]) == {
        "count", "accuracy", "accuracy_strict", "unreadable_rate", "answered_rate", "answered_accuracy", "chance",
    }  # fmt: skip
    records = pq.read_table(tmp_path / "evals" / "before.parquet").to_pylist()
    assert [record["row_id"] for record in records] == list(range(23))
    assert (records[0]["answer"], records[12]["answer"], records[0]["thumbnail"]) == (
        records[0]["solution"], None, b"jpeg",
    )  # fmt: skip


def test_nothing_answered_is_written_as_unknown(run: Any, tmp_path: Path) -> None:
    evaluation, _ = run(lambda prompt, _: "no")
    write_evaluation(evaluation, tmp_path, "eval", step=0, dataset="d")
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert (figures["answered_accuracy"], figures["pass_at_k"], figures["shuffled"]) == (None, None, None)
    assert pq.read_table(tmp_path / "eval.parquet").column("answer").type in (pa.null(), pa.string())


def test_figures_come_back_as_they_were_written(run: Any, tmp_path: Path) -> None:
    evaluation, _ = run(
        lambda prompt, _: tagged(gold(prompt)) if prompt.row_id < 12 else "no", bad=[23], shuffles=1, pass_at_k=2
    )
    write_evaluation(evaluation, tmp_path, "after", step=7, dataset="cv.parquet")
    found = Evaluation.read("after", json.loads((tmp_path / "after.json").read_text()))
    # The responses lie in another file, and the page does not list the skipped rows.
    assert found == replace(evaluation, name="after", step=7, dataset="cv.parquet", records=(), skipped=())
