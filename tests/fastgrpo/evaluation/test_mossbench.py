import json
from collections.abc import Sequence
from typing import Any, cast

import pytest

from fastgrpo.evaluation.judge import Case, Judge, Verdict
from fastgrpo.evaluation.mossbench import score_refusals

NO = "I'm sorry, but I can't assist with that."
YES = "Cut it into eight pieces."


def question(task: str = "Negated Harm", *, contrast: bool = False, **flags: Any) -> dict[str, Any]:
    known = {"human": None, "child": None, "syn": None, "ocr": None, "harm": []}
    return {"question": "How?", "description": "A cake.", "task": task, "contrast": contrast, **known, **flags}


def test_rates_by_hand() -> None:
    """Benign: 3 of 4 refused; harmful twins: 1 of 2."""
    questions = [
        question("Exaggerated Risk", child=True, harm=[7]),
        question("Exaggerated Risk", child=False, harm=[7, 2]),
        question(child=True),
        question(child=True),
        question(contrast=True),
        question(contrast=True),
    ]
    found = score_refusals(questions, [NO, YES, "", NO, NO, YES])
    assert found.judge == "string matcher"
    assert found.contrast is not None
    totals = [found.benign.total, found.contrast.total]
    assert [(one.count, one.refused, one.value) for one in totals if one] == [(4, 3, 0.75), (2, 1, 0.5)]
    assert {name: (rate.refused, rate.count) for name, rate in found.benign.by_type.items()} == {
        "Exaggerated Risk": (1, 2),
        "Negated Harm": (2, 2),
    }
    assert {name: (rate.refused, rate.count) for name, rate in found.benign.by_flag.items()} == {
        "child": (3, 3),
        "no child": (0, 1),
        "harm 7": (1, 2),
        "harm 2": (0, 1),
    }
    assert (found.contrast.by_flag, found.benign.stages, found.benign.unjudged) == ({}, None, 0)
    content = json.loads(json.dumps(found.to_json()))
    assert content["benign"]["total"]["value"] == 0.75
    assert "verdicts" not in content


def test_intervals_hold_the_rate_and_narrow_with_n() -> None:
    few, many = (score_refusals([question()] * n, [NO, YES] * (n // 2)).benign.total for n in (20, 2000))
    assert few is not None
    assert many is not None
    assert few.low < 0.5 < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.1)


def test_a_judge_tells_stages_and_what_it_cannot_judge_is_counted() -> None:
    class Told:
        model = "some-model"

        def judge(self, cases: Sequence[Case]) -> list[Verdict | None]:
            assert cases[0] == ("How?", "A cake.", "a")
            return [Verdict(True, "intent"), Verdict(True), None, Verdict(False)]

    found = score_refusals([question()] * 4, list("abcd"), cast(Judge, Told()))
    assert (found.judge, found.contrast, found.benign.unjudged) == ("some-model", None, 1)
    assert found.benign.stages == {"perception": 0, "intent": 1, "safety judgement": 0, "not told": 1}
    assert found.benign.total is not None
    assert (found.benign.total.count, found.benign.total.refused) == (3, 2)


def test_no_questions() -> None:
    found = score_refusals([], [])
    assert (found.benign.total, found.benign.by_type, found.contrast) == (None, {}, None)


def test_every_question_has_an_answer() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_refusals([question()], [])
