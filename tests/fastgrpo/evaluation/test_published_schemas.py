"""Every benchmark's rows, good and bad, asked and scored: figures as one counts them by hand."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from benchmark_rows import blink_row, cvbench_row, picture, sat_row, vsr_row
from PIL import Image

from fastgrpo.data.benchmarks import load_benchmark
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.evaluation import Evaluation, evaluate
from fastgrpo.model.load import load_processing
from fastgrpo.types import Completion, Prompt, Rollout, SamplingParams

Score = Callable[..., Evaluation]
CORRUPT = {"bytes": b"\x89PNG\r\n\x1a\n", "path": "picture.png"}
WEBP = picture("WEBP")


class Speaker:
    """Says the text of each row."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def sync(self) -> None:
        """It has no weights."""

    def generate(self, prompts: Sequence[Prompt], k: int, params: SamplingParams, step: int) -> Iterator[Rollout]:
        for prompt in prompts:
            text, nothing = self.texts[prompt.row_id], torch.zeros(1)
            yield Rollout(prompt, (Completion(prompt.row_id, 0, nothing.long(), text, "stop", nothing, nothing),))


@pytest.fixture
def score(tiny_model_dir: Path, tmp_path: Path) -> Score:
    """Writes the rows to a file, and scores what is said to each."""
    processing = load_processing(str(tiny_model_dir))

    def run(benchmark: str, rows: Sequence[tuple[dict[str, Any], str]]) -> Evaluation:
        file = tmp_path / f"{benchmark}.parquet"
        pq.write_table(pa.Table.from_pylist([row for row, _ in rows]), file)
        loaded = load_benchmark(benchmark, str(file))
        builder = PromptBuilder(processing.tokenizer, processing.image_processor, family=processing.family)
        return evaluate(Speaker([text for _, text in rows]), builder, loaded, max_new_tokens=8)

    return run


def tagged(answer: str) -> str:
    return f"I see.</think> <answer>{answer}</answer>"


def skipped(evaluation: Evaluation) -> list[tuple[int, str]]:
    return [(row.row_id, row.reason) for row in evaluation.skipped]


def accuracy_by_task(evaluation: Evaluation) -> dict[str, tuple[int | None, float | None]]:
    return {task: (score.count, score.accuracy) for task, score in evaluation.by_task.items()}


def test_cvbench(score: Score) -> None:
    evaluation = score(
        "cvbench",
        [
            (cvbench_row(), tagged("(A)")),
            (cvbench_row(image=CORRUPT), tagged("(A)")),
            (cvbench_row(image=WEBP), tagged("(B)")),
            (cvbench_row(task="Depth", answer="b"), tagged("1")),
            (cvbench_row(task="Depth", answer="(F)"), tagged("(F)")),
            (cvbench_row(task="Depth", image=None), tagged("(A)")),
            (cvbench_row(task="Depth"), ""),
            (cvbench_row(task="Depth"), "(A)"),
        ],
    )
    assert accuracy_by_task(evaluation) == {"Count": (2, 0.5), "Depth": (3, pytest.approx(2 / 3))}
    assert (evaluation.total.count, evaluation.total.accuracy, evaluation.total.chance) == (5, 0.6, 0.5)
    assert [row for row, _ in skipped(evaluation)] == [1, 4, 5]
    assert [reason.split(":")[0] for _, reason in skipped(evaluation)] == [
        "image cannot be decoded", "answer '(F)' is not a letter of the 2 choices", "image is missing",
    ]  # fmt: skip


def test_sat(score: Score) -> None:
    evaluation = score(
        "sat",
        [
            (sat_row(), tagged("left")),
            (sat_row(correct_answer="right", question_type="motion"), tagged("left")),
            (sat_row(image_bytes=[WEBP["bytes"], WEBP["bytes"]], question_type="motion"), tagged("LEFT.")),
            (sat_row(image_bytes=[]), tagged("left")),
            (sat_row(correct_answer="up"), tagged("up")),
        ],
    )
    assert accuracy_by_task(evaluation) == {"motion": (2, 0.5), "relative": (1, 1.0)}
    assert skipped(evaluation) == [
        (3, "image_bytes is empty"), (4, "correct_answer 'up' is not among the answers ['left', 'right']"),
    ]  # fmt: skip


def test_blink(score: Score) -> None:
    evaluation = score(
        "blink",
        [
            (blink_row("Relative_Depth", 1), tagged("(B)")),
            (blink_row("Relative_Depth", 2, image_2=WEBP), tagged("B is closer")),
            (blink_row("Spatial_Relation", 3, choices=["yes", "no"]), tagged("yes")),
            (blink_row("Spatial_Relation", 4, answer="hidden"), tagged("(B)")),
            (blink_row("Spatial_Relation", 5, image_1=CORRUPT), tagged("(B)")),
            (blink_row("Spatial_Relation", 6, choices=["yes", "no"]), tagged("No.")),
        ],
    )
    assert accuracy_by_task(evaluation) == {"Relative_Depth": (2, 1.0), "Spatial_Relation": (2, 0.5)}
    assert evaluation.total.accuracy == 0.75
    assert [row for row, _ in skipped(evaluation)] == [3, 4]


def test_vsr(score: Score, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    Image.new("RGB", (40, 30)).save(tmp_path / "2.png", format="WEBP")
    evaluation = score(
        "vsr",
        [
            (vsr_row(), tagged("(A)")),
            (vsr_row(label=0, image="2.png"), tagged("False")),
            (vsr_row(label=0), tagged("True")),
            (vsr_row(image="3.jpg"), tagged("True")),
            (vsr_row(), "  "),
        ],
    )
    assert (evaluation.total.count, evaluation.total.accuracy, evaluation.total.answered_rate) == (4, 0.5, 0.75)
    assert skipped(evaluation) == [
        (3, "image file '3.jpg' does not exist (published at http://images.example/1.jpg)")
    ]  # fmt: skip


def test_nothing_but_bad_rows(score: Score) -> None:
    with pytest.raises(ValueError, match="none of the 2 rows can be used; row 0: answer 'hidden' is not a letter"):
        score("blink", [(blink_row(answer="hidden"), ""), (blink_row(answer="hidden"), "")])
