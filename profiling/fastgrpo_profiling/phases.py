"""The fixed list of leaf spans, whose time counts as attributed, and the phase of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of a step with its own bar in tables and charts."""

    name: str
    description: str
    spans: tuple[str, ...]
    """The leaf spans that make it up."""


PHASES: tuple[Phase, ...] = (
    Phase("data", "rows read and decoded, prompts rendered and tokenized", ("data",)),
    Phase("images", "pictures resized and cut into patches", ("data/images",)),
    Phase("vision", "the vision tower, for rollouts", ("rollout/vision",)),
    Phase("prefill", "prompts through the decoder, for rollouts", ("rollout/prefill",)),
    Phase("decode", "completion tokens through the decoder, one at a time", ("rollout/decode",)),
    Phase("sampling", "logits to tokens and their log-probs", ("rollout/sample",)),
    Phase(
        "generation", "what surrounds the model in generation", ("rollout/generate", "rollout/arrange", "rollout/check")
    ),
    Phase("sync", "weights from the policy to the sampler", ("rollout/sync",)),
    Phase("rewards", "reward functions", ("reward",)),
    Phase("advantages", "rewards to advantages to token weights", ("advantages", "update/plan")),
    Phase("packing", "sequences laid out in micro-batches", ("update/pack",)),
    Phase("old log-probs", "log-probs before the first update on a rollout", ("update/old_logprobs", "update/entropy")),
    Phase("reference", "log-probs of the frozen model", ("update/reference_model",)),
    Phase("forward", "the policy on prompts and completions", ("update/forward",)),
    Phase("head", "hidden states to log-probs, where no logits are handed out", ("update/head",)),
    Phase("backward", "gradients", ("update/backward",)),
    Phase("optimizer", "clipping, the optimizer and its schedule", ("update/clip", "update/optimizer")),
    Phase("metrics", "figures read back, logs and checkpoints", ("update/metrics", "log")),
)
"""In the order of a step. Add new leaf spans here, or their time shows as unattributed."""

PARTS: dict[str, tuple[str, ...]] = {
    "rollout": ("vision", "prefill", "decode", "sampling", "generation", "sync"),
    "reward": ("rewards",),
    "update": ("packing", "old log-probs", "reference", "forward", "head", "backward", "optimizer"),
}
"""A step in three parts, for a summary line; the rest is `OTHER`."""
OTHER = "other"

UNATTRIBUTED = "unattributed"
"""Time of a step that no leaf span covers, parents' own time included."""

PHASE_OF: dict[str, str] = {name: phase.name for phase in PHASES for name in phase.spans}
"""Leaf span → phase."""


def in_step_order(names: Iterable[str]) -> list[str]:
    """Phases in the order of a step, the unattributed last."""
    given = set(names)
    return [name for name in (*(phase.name for phase in PHASES), UNATTRIBUTED) if name in given]


def phase_seconds(own_seconds: Mapping[str, float], step_seconds: float) -> dict[str, float]:
    """Seconds by phase, in the order of `PHASES`; the unattributed time comes last.

    Args:
        own_seconds: a step's spans by name, each without the spans nested in it.
        step_seconds: the whole step.
    """
    found = dict.fromkeys((phase.name for phase in PHASES), 0.0)
    for name, seconds in own_seconds.items():
        if name in PHASE_OF:
            found[PHASE_OF[name]] += seconds
    rest = max(step_seconds - sum(found.values()), 0.0)
    return {name: seconds for name, seconds in found.items() if seconds > 0} | {UNATTRIBUTED: rest}


def part_shares(own_seconds: Mapping[str, float], step_seconds: float) -> dict[str, float]:
    """Share of a step by part, the rest as `OTHER`; they add up to 1.

    Args: as of `phase_seconds`.
    """
    phases = phase_seconds(own_seconds, step_seconds)
    whole = sum(phases.values())
    shares = {part: sum(phases.get(name, 0.0) for name in names) / whole for part, names in PARTS.items()}
    return shares | {OTHER: 1 - sum(shares.values())}
