"""Claims about a lab, judged one by one: yes, no, or not enough to say, with effect, interval and n.

A claim has conditions, all of which must hold. Each is about one measure of one arm: that it rises (or falls) from the
beginning to the end of training, or that it ends higher (or lower) than in another arm. The effect is the mean over
seeds, paired by seed, and its interval Student's: what another seed would be expected to show.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastgrpo.evaluation.figures import number
from fastgrpo.report.arms import ArmRuns
from fastgrpo.report.formats import NBSP, PERCENT, probability
from fastgrpo.report.measures import MEASURES, Measure
from fastgrpo.report.seeds import Mean

Answer = Literal["yes", "no", "unknown"]
LABELS: dict[Answer, str] = {"yes": "Yes", "no": "No", "unknown": "Not enough to say"}


@dataclass(frozen=True)
class Condition:
    """One thing that a claim says."""

    arm: str
    measure: Measure
    sign: int
    """1: up, -1: down."""
    against: str | None = None
    """The arm that `arm` is compared with at the end; None: its own beginning."""
    at_least: float = 0.0
    """Effects below this are not what the claim means."""


@dataclass(frozen=True)
class Claim:
    """What a lab is asked."""

    says: str
    conditions: tuple[Condition, ...]
    not_claimed: str = ""


@dataclass(frozen=True)
class Finding:
    """A condition's answer, and its figures in words."""

    answer: Answer
    text: str


@dataclass(frozen=True)
class Judgement:
    """A claim's answer: yes if all conditions are, no if one is, else unknown."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def answer(self) -> Answer:
        answers = {finding.answer for finding in self.findings}
        return "no" if "no" in answers else "unknown" if "unknown" in answers else "yes"

    @property
    def label(self) -> str:
        return LABELS[self.answer]


def read_claim(content: Mapping[str, Any], arms: Collection[str]) -> Claim:
    """From a lab's file: `says`, `conditions` (each `arm`, `measure`, `direction`, `against`, `at_least`),
    `not_claimed`.

    Raises:
        ValueError: a field that is missing, unknown or does not fit; the message names it.
    """
    says = content.get("says")
    if not isinstance(says, str) or not says:
        raise ValueError(f"claims: says is {says!r}: give what is claimed, in words")
    where = f"claims: {says}"
    _only(content, ("says", "conditions", "not_claimed"), where)
    conditions = content.get("conditions")
    if not isinstance(conditions, Sequence) or not conditions or isinstance(conditions, str):
        raise ValueError(f"{where}: conditions is {conditions!r}: give a list of conditions")
    return Claim(says, tuple(_condition(one, arms, where) for one in conditions), str(content.get("not_claimed") or ""))


def _condition(content: Any, arms: Collection[str], where: str) -> Condition:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: conditions: {content!r} has no arm, measure and direction")
    _only(content, ("arm", "measure", "direction", "against", "at_least"), where)
    arm, name, direction, against = (content.get(key) for key in ("arm", "measure", "direction", "against"))
    for key, value in (("arm", arm), ("against", against)):
        if value not in arms and not (key == "against" and value is None):
            raise ValueError(f"{where}: {key} is {value!r}: use one of {', '.join(arms)}")
    if name not in MEASURES:
        raise ValueError(f"{where}: measure is {name!r}: use one of {', '.join(MEASURES)}")
    if direction not in ("up", "down"):
        raise ValueError(f"{where}: direction is {direction!r}: use up or down")
    at_least = number(content.get("at_least", 0.0))
    if at_least is None or at_least < 0:
        raise ValueError(f"{where}: at_least is {content['at_least']!r}: give a number from 0")
    return Condition(str(arm), MEASURES[str(name)], 1 if direction == "up" else -1, against, at_least)


def _only(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := next((name for name in content if name not in known), None):
        raise ValueError(f"{where}: unknown field {unknown}: use {', '.join(known)}")


def claims_of(contents: Sequence[Mapping[str, Any]], arms: Sequence[ArmRuns]) -> list[Claim]:
    """The lab's claims; where it names none, that each arm's answers grow longer, more reflective, more often right."""
    if contents:
        return [read_claim(content, [arm.name for arm in arms]) for content in contents]
    said = {
        "held_out/accuracy": "more answers are right after training",
        "training/length": "responses grow longer",
        "training/reflective_share": "responses grow more reflective",
    }
    return [
        Claim(f"{arm.name}: {words}", (Condition(arm.name, MEASURES[name], 1),))
        for arm in arms
        for name, words in said.items()
        if arm.command == "train" or name.startswith("held_out/")
    ]


def judge(claim: Claim, arms: Mapping[str, ArmRuns]) -> Judgement:
    """Each condition's finding from the arms' runs."""
    return Judgement(claim, tuple(_find(condition, arms) for condition in claim.conditions))


def _find(condition: Condition, arms: Mapping[str, ArmRuns]) -> Finding:
    measure = condition.measure
    own = {seed: measure.of(run) for seed, run in arms[condition.arm].runs.items()}
    if condition.against is None:
        pairs = {seed: (change.first, change.last) for seed, change in own.items()}
        name, ends = condition.arm, "from {} to {}"
    else:
        other = {seed: measure.of(run) for seed, run in arms[condition.against].runs.items()}
        pairs = {seed: (other[seed].last, own[seed].last) for seed in own if seed in other}
        name, ends = f"{condition.arm} against {condition.against}", "{1} against {0}"
    known = [(a, b) for a, b in pairs.values() if a is not None and b is not None]
    subject = f"{measure.title}, {name}"
    if not known:
        return Finding("unknown", f"{subject}: not measured.")
    effect = Mean(tuple(b - a for a, b in known))
    middle = [measure.text(Mean(values).mean) for values in zip(*known, strict=True)]
    told = f"{subject}: {ends.format(*middle)}, {effect_text(effect, measure)}"
    if effect.interval is None:
        return Finding("unknown", f"{told}. One seed has no interval.")
    least, low, high = condition.at_least, effect.interval.low, effect.interval.high
    low, high = (low, high) if condition.sign > 0 else (-high, -low)
    if low > 0 and condition.sign * effect.mean >= least:
        return Finding("yes", f"{told}.")
    if high <= 0 or high < least:
        return Finding("no", f"{told}.")
    return Finding("unknown", f"{told}: the interval leaves both open.")


def effect_text(effect: Mean, measure: Measure) -> str:
    """Like "+9.1 tokens (95 % interval +8.0 to +10.2, n = 3 seeds, p = 0.002)"."""
    unit = measure.difference_unit
    head = f"{measure.difference_text(effect.mean)}{' ' * bool(unit)}{unit}"
    if effect.interval is None:
        return f"{head} (n{NBSP}={NBSP}1 seed)"
    low, high = (measure.difference_text(end) for end in (effect.interval.low, effect.interval.high))
    p = "" if effect.p is None else f", p{NBSP}={NBSP}{probability(effect.p)}"
    return f"{head} (95{PERCENT} interval {low} to {high}, n{NBSP}={NBSP}{effect.n} seeds{p})"
