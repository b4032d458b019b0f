"""The mixes of documents, and building the models twice. What training makes of them is docs/aha_mini.md's."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from fastgrpo.demo.corpus import RECHECK, answer_kind, completion, hasty, looking, place
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.miniature import BASE, BASE_MIX, INSTRUCT, INSTRUCT_MIX, Sizes, build
from fastgrpo.demo.scenes import scene_question
from fastgrpo.model.load import load_processing
from fastgrpo.scoring.reflection import count_reflections
from fastgrpo.scoring.tagged import tagged_accuracy, tagged_format

COUNT = 4000
QUESTIONS = [scene_question(11, index, kinds=DEMO_KINDS) for index in range(COUNT)]
CAREFUL = (1 - BASE_MIX.slips) * BASE_MIX.rechecks[0]
RECHECKS = CAREFUL + BASE_MIX.slips * BASE_MIX.rechecks[1]
"""Share of reasoned completions that check."""


def texts(mix, careful):
    rng = np.random.default_rng(0)
    return [completion(question, rng, careful, mix) for question in QUESTIONS]


def is_right(question, text):
    return tagged_accuracy([""], [text], [question.answer], [list(question.choices)]) == [1.0]


def share(flags):
    return float(np.mean(list(flags)))


def test_base_seldom_looks_and_more_seldom_checks():
    written = texts(BASE_MIX, BASE.shares[-1])
    looks = [text for text in written if answer_kind(text) != "guess"]
    assert 0.05 < len(looks) / len(written) < 0.18
    assert share(RECHECK in text for text in looks) == pytest.approx(RECHECKS, abs=0.07)
    assert all((count_reflections(text) > 0) == (RECHECK in text) for text in written)


def test_tags_pay_for_neither_looks_nor_guesses():
    """The form-only control starts level."""
    for careful in (0.0, 1.0):
        written = texts(BASE_MIX, careful)
        assert share(tagged_format(["<think>"], [text])[0] for text in written) == pytest.approx(0.5, abs=0.03)


def test_answers_of_looks_are_better_than_guesses_and_checked_ones_are_right():
    mix = replace(BASE_MIX, tagged_guesses=(1.0,) * 3, tagged_reasons=1.0)
    right = {
        careful: [is_right(*pair) for pair in zip(QUESTIONS, texts(mix, careful), strict=True)] for careful in (0, 1)
    }
    chance = share(1 / len(question.choices) for question in QUESTIONS)
    assert share(right[0]) == pytest.approx(chance, abs=0.03)
    checked = [RECHECK in text for text in texts(mix, 1)]
    assert all(correct for correct, check in zip(right[1], checked, strict=True) if check)
    once = [correct for correct, check in zip(right[1], checked, strict=True) if not check]
    assert share(once) == pytest.approx((1 - mix.slips - CAREFUL) / (1 - RECHECKS), abs=0.03)


def test_looks_state_the_scene():
    for question in QUESTIONS[:400]:
        said = looking(question, count_each=True)
        numbers = [int(number) for number in re.findall(r"\d", said)]
        if question.kind == "count":
            assert numbers[-1] == len(question.subjects) == int(question.answer)
            assert sum(numbers[:-1]) in (0, numbers[-1])
        else:
            axis = "x" if question.kind == "left_right" else "y"
            assert numbers == [place(getattr(thing, axis)) for thing in question.subjects]
            assert [thing.colour for thing in question.subjects] == re.findall(r" (\w+) \d", said)


def test_a_hasty_look_leads_to_the_wrong_answer():
    rng = np.random.default_rng(0)
    for question in QUESTIONS[:400]:
        seen = hasty(question, rng)
        assert seen.answer in question.choices
        assert seen.answer != question.answer
        if question.kind == "count":
            assert len(seen.subjects) == int(seen.answer)
        else:
            first, second = (int(number) for number in re.findall(r"\d", looking(seen)))
            order = {"left": first < second, "above": first < second, "farther": first < second}
            assert order.get(seen.answer, first > second)


def test_instruct_answers_at_once_and_right():
    pairs = list(zip(QUESTIONS, texts(INSTRUCT_MIX, INSTRUCT.shares[-1]), strict=True))
    blurted = [(question, text) for question, text in pairs if answer_kind(text) == "guess"]
    assert len(blurted) / len(pairs) == pytest.approx(0.98, abs=0.01)
    assert all(is_right(*pair) for pair in blurted)


def test_kinds_of_answers_are_told_by_their_words():
    kinds = [answer_kind(text) for text in texts(replace(BASE_MIX, rechecks=(1.0, 1.0)), 0.5)]
    assert share(kind == "check" for kind in kinds) == pytest.approx(0.5, abs=0.03)
    assert "look" not in kinds


def test_build_is_seeded_and_done_once(tmp_path, capsys):
    short = Sizes(replace(BASE, steps=2, pictures=8), replace(INSTRUCT, steps=1, pictures=8), train_rows=3, questions=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, seed, short)
    assert pq.read_metadata(tmp_path / "a" / "train.parquet").num_rows == 3
    assert pq.read_metadata(tmp_path / "a" / "heldout.parquet").num_rows == 2
    for model, kinds in json.loads((tmp_path / "a" / "behaviour.json").read_text()).items():
        assert sum(figures["share"] for figures in kinds.values()) == pytest.approx(1)
        first, same, other = (load_file(tmp_path / name / model / "model.safetensors") for name in "abc")
        assert all(first[key].equal(same[key]) for key in first)
        assert not all(first[key].equal(other[key]) for key in first)
        assert load_processing(str(tmp_path / "a" / model)).image_processor is not None
    assert not load_file(tmp_path / "a" / "base" / "model.safetensors")["model.norm.weight"].equal(
        load_file(tmp_path / "a" / "instruct" / "model.safetensors")["model.norm.weight"]
    )
    before = (tmp_path / "a" / "recipe.json").stat().st_mtime_ns
    build(tmp_path / "a", 0, short)
    assert (tmp_path / "a" / "recipe.json").stat().st_mtime_ns == before
    assert "is built" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was not made with this seed"):
        build(tmp_path / "a", 1, short)
