"""What a claim comes to: the effect over seeds decides, and its interval."""

import json
import re
from pathlib import Path

import pytest

from fastgrpo.report.arms import read_lab_runs
from fastgrpo.report.claims import claims_of, judge, read_claim


def lab_of(folder: Path, lengths: dict[str, list[tuple[float, float]]], accuracy: float = 0.5) -> Path:
    """A lab whose arms' runs went from one length to another, a pair for each seed."""
    seeds = range(max(map(len, lengths.values())))
    arms = [{"name": name, "about": "", "command": "train"} for name in lengths]
    folder.mkdir()
    (folder / "lab.json").write_text(json.dumps({"arms": arms, "seeds": list(seeds)}))
    for name, pairs in lengths.items():
        for seed, (first, last) in enumerate(pairs):
            run = folder / name / f"seed-{seed}"
            run.mkdir(parents=True)
            steps = [first] * 10 + [last] * 10
            lines = [{"step": i + 1, "completions/mean_length": value} for i, value in enumerate(steps)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def claim(**condition: object) -> dict[str, object]:
    return {"says": "it is so", "conditions": [{"measure": "training/length", "direction": "up", **condition}]}


@pytest.mark.parametrize(
    ("pairs", "condition", "answer"),
    [
        ([(10, 20), (10, 21), (10, 19)], {}, "yes"),
        ([(10, 20), (10, 21), (10, 19)], {"direction": "down"}, "no"),
        ([(20, 10), (21, 10), (19, 10)], {"direction": "down"}, "yes"),
        ([(10, 30), (10, 10), (10, 12)], {}, "unknown"),
        ([(10, 10), (10, 10), (10, 10)], {}, "no"),
        ([(10, 20)], {}, "unknown"),
        ([(10, 20), (10, 21), (10, 19)], {"at_least": 50}, "no"),
        ([(10, 20), (10, 21), (10, 19)], {"at_least": 11}, "unknown"),
        ([(10, 20), (10, 21), (10, 19)], {"measure": "training/kl"}, "unknown"),
    ],
)
def test_answer(tmp_path, pairs, condition, answer):
    arms = read_lab_runs(lab_of(tmp_path / "lab", {"rl": pairs})).arms
    (one,) = claims_of([claim(arm="rl", **condition)], arms)
    assert judge(one, {arm.name: arm for arm in arms}).answer == answer


def test_effect_interval_and_n_are_told(tmp_path):
    """Rises 10, 11 and 9: mean 10, standard deviation 1, half width 4.303 / √3 = 2.48."""
    arms = read_lab_runs(lab_of(tmp_path / "lab", {"rl": [(10, 20), (10, 21), (10, 19)]})).arms
    (one,) = claims_of([claim(arm="rl")], arms)
    (finding,) = judge(one, {arm.name: arm for arm in arms}).findings
    assert finding.text.replace("\N{NO-BREAK SPACE}", " ") == (
        "response length in training, rl: from 10 to 20, +10.0 tokens (95 % interval +7.5 to +12.5, n = 3 seeds, "
        "p = 0.0033)."
    )


def test_arms_are_compared_by_seed_at_the_end(tmp_path):
    lengths = {"rl": [(1, 20), (1, 31), (1, 42)], "control": [(1, 10), (1, 20), (1, 30)]}
    arms = {arm.name: arm for arm in read_lab_runs(lab_of(tmp_path / "lab", lengths)).arms}
    (one,) = claims_of([claim(arm="rl", against="control")], list(arms.values()))
    (finding,) = judge(one, arms).findings
    assert "31.0 against 20.0" in finding.text or "31 against 20" in finding.text
    assert "+11.0 tokens" in finding.text
    assert finding.answer == "yes"


def test_all_conditions_must_hold(tmp_path):
    rising, mixed, falling = (
        [(10, 20), (10, 21), (10, 19)],
        [(10, 30), (10, 10), (10, 12)],
        [(20, 10), (21, 10), (19, 10)],
    )
    arms = {
        arm.name: arm for arm in read_lab_runs(lab_of(tmp_path / "lab", {"a": rising, "b": mixed, "c": falling})).arms
    }

    def answer(*names: str) -> str:
        conditions = [{"arm": name, "measure": "training/length", "direction": "up"} for name in names]
        (one,) = claims_of([{"says": "all", "conditions": conditions}], list(arms.values()))
        return judge(one, arms).answer

    assert (answer("a", "a"), answer("a", "b"), answer("a", "b", "c")) == ("yes", "unknown", "no")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"arm": "lr"}, "arm is 'lr': use one of rl"),
        ({"measure": "length"}, "measure is 'length': use one of training/accuracy"),
        ({"direction": "higher"}, "direction is 'higher': use up or down"),
        ({"against": "sft"}, "against is 'sft'"),
        ({"at_least": -1}, "at_least is -1"),
        ({"than": "sft"}, "unknown field than"),
    ],
)
def test_a_mistake_is_named(changed, named):
    with pytest.raises(ValueError, match=re.escape(f"claims: it is so: {named}")):
        read_claim(claim(**{"arm": "rl", **changed}), ["rl"])
