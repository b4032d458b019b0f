import io
import itertools
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastgrpo.data.cvbench import convert_cvbench
from fastgrpo.data.sat import convert_sat
from fastgrpo.demo.scenes import (
    COLOURS,
    CVBENCH_SCHEMA,
    CVBENCH_TASKS,
    KINDS,
    MIN_GAP,
    SAT_SCHEMA,
    WORDINGS,
    SyntheticScenes,
    cvbench_row,
    render,
    sat_row,
    scene_question,
    write_cvbench_parquet,
    write_sat_parquet,
)

MANY = 4000


def questions(kind, count, split="train", seed=0):
    return [scene_question(seed, index, split=split, kinds=(kind,)) for index in range(count)]


def test_row_is_a_function_of_seed_split_and_index():
    scenes = SyntheticScenes(3)
    assert scenes[17] == SyntheticScenes(3)[17]
    assert [row["question"] for row in itertools.islice(scenes, 4)] == [scenes[i]["question"] for i in range(4)]
    others = [SyntheticScenes(4)[17], SyntheticScenes(3, split="heldout")[17], scenes[18]]
    assert all(other["image_bytes"] != scenes[17]["image_bytes"] for other in others)


def test_sat_rows_have_exactly_its_columns(tmp_path):
    write_sat_parquet(tmp_path / "sat.parquet", 12, seed=1)
    table = pq.read_table(tmp_path / "sat.parquet")
    assert table.schema.equals(SAT_SCHEMA)
    assert table.column_names == ["image_bytes", "question", "answers", "question_type", "correct_answer"]
    for index, row in enumerate(table.to_pylist()):
        assert row["correct_answer"] == row["answers"][0]
        assert len(row["image_bytes"]) == 1
        assert convert_sat(row, index).columns["solution"] == row["correct_answer"]


def test_cvbench_rows_have_exactly_its_columns(tmp_path):
    write_cvbench_parquet(tmp_path / "cv.parquet", 12, seed=1)
    table = pq.read_table(tmp_path / "cv.parquet")
    assert table.schema.equals(CVBENCH_SCHEMA)
    assert table.column_names == [
        "idx",
        "type",
        "task",
        "image",
        "question",
        "choices",
        "answer",
        "prompt",
        "filename",
        "source",
        "source_dataset",
        "source_filename",
        "target_class",
        "target_size",
        "bbox",
    ]
    for index, row in enumerate(table.to_pylist()):
        assert row["idx"] == index
        assert set(row["image"]) == {"bytes", "path"}
        assert convert_cvbench(row, index).columns["task"] == row["task"]


@pytest.mark.parametrize("kind", KINDS)
def test_cvbench_letter_names_the_gold_option(kind):
    for question in questions(kind, 50, split="heldout"):
        row = cvbench_row(question)
        assert row["choices"]["ABCD".index(row["answer"][1])] == question.answer
        assert f"\n{row['answer']} {question.answer}" in row["prompt"]
        assert row["prompt"].startswith(question.question + " Select from the following choices.\n(A) ")
        assert row["task"] == CVBENCH_TASKS[kind]


def test_no_picture_is_in_both_splits():
    """Not by luck: the low bit of the first pixel is the split."""
    for split, bit in (("train", 0), ("heldout", 1)):
        for index in range(60):
            pixels = np.asarray(render(scene_question(0, index, split=split)))
            assert pixels[0, 0, 2] & 1 == bit
    train = {sat_row(scene_question(0, index))["image_bytes"][0] for index in range(60)}
    held_out = {cvbench_row(scene_question(0, index, split="heldout"))["image"]["bytes"] for index in range(60)}
    assert len(train) == len(held_out) == 60
    assert not train & held_out


def uniform(counts, options):
    """Within four standard deviations of an even spread."""
    total = sum(counts.values())
    share = 1 / options
    tolerance = 4 * (share * (1 - share) / total) ** 0.5
    return all(abs(count / total - share) < tolerance for count in counts.values()) and len(counts) == options


@pytest.mark.parametrize("kind", KINDS)
def test_gold_is_even_and_independent_of_the_words(kind):
    asked = questions(kind, MANY)
    options = len(asked[0].choices)
    position, by_clue = Counter(), defaultdict(Counter)
    for question in asked:
        position[question.choices.index(question.answer)] += 1
        words = question.question.replace("?", "").replace(",", "").split()
        named = sorted(range(options), key=lambda i: question.question.find(question.choices[i]))
        # As the option's text, or for options that the question itself names, by which it names first.
        label = named.index(question.choices.index(question.answer)) if kind == "distance" else question.answer
        first_colour = next((word for word in words if word in COLOURS), "none")
        for clue in ("all", f"wording {question.wording}", f"colour {first_colour}", f"first {question.choices[0]}"):
            by_clue[clue][label] += 1
    assert uniform(position, options)
    for clue, counts in by_clue.items():
        if sum(counts.values()) > 200:
            assert uniform(counts, options), (clue, counts)


@pytest.mark.parametrize("kind", ["left_right", "above_below"])
def test_relations_hold_in_the_scene(kind):
    for question in questions(kind, 200):
        a, b = question.subjects
        gap = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[question.answer]
        assert gap >= MIN_GAP


def test_depth_and_distance_hold_in_the_scene():
    for question in questions("depth", 200):
        a, b = question.subjects
        nearer, farther = (a, b) if question.answer == "nearer" else (b, a)
        assert nearer.y - farther.y >= MIN_GAP
        assert nearer.radius > farther.radius
    for question in questions("distance", 200):
        *pair, target = question.subjects
        gaps = [np.hypot(thing.x - target.x, thing.y - target.y) for thing in pair]
        assert question.answer == pair[int(np.argmin(gaps))].name


def test_counts_hold_in_the_scene():
    for question in questions("count", 200):
        colour = next((word for word in COLOURS if f" {word} " in question.question), None)
        counted = [thing for thing in question.objects if colour in (None, thing.colour)]
        assert question.answer == str(len(counted))


def test_objects_are_unique_by_name_and_drawn_where_they_are():
    for question in questions("left_right", 40):
        assert len({thing.colour for thing in question.objects}) == len(question.objects)
        pixels = np.asarray(render(question))
        for thing in question.objects:
            centre = pixels[int(thing.y * question.height), int(thing.x * question.width)]
            assert tuple(centre) == COLOURS[thing.colour]


def test_every_wording_and_several_sizes_occur():
    asked = [scene_question(0, index) for index in range(600)]
    assert {(q.kind, q.wording) for q in asked} == {(kind, i) for kind in KINDS for i in range(len(WORDINGS[kind]))}
    assert len({(q.width, q.height) for q in asked}) > 100
    row = SyntheticScenes(0, image_size=84)[0]
    assert 68 <= Image.open(io.BytesIO(row["image_bytes"][0])).width <= 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kinds": ("size",)}, "size"),
        ({"kinds": ()}, "kinds"),
        ({"split": "test"}, "test"),
        ({"seed": -1}, "-1"),
        ({"image_size": 10}, "10"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        SyntheticScenes(**{"seed": 0, **arguments})
