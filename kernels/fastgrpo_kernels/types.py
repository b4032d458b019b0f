"""Parameters and results of the ops, shared by every implementation of them."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Surrogate = Literal["clipped", "cispo", "sapo", "reinforce"]
Level = Literal["token", "sequence"]

LOG_RATIO_CAP = 60.0
"""|log ratio| beyond which a probability ratio is constant."""
KL_CAP = 20.0
"""|reference log-prob − log-prob| beyond which the KL estimate is constant: finite, without gradient. Times a capped
ratio, exp(KL_CAP + LOG_RATIO_CAP), it stays below float32's largest number, e^88.7."""


class LogprobOutput(NamedTuple):
    """What the log-prob ops return, one entry per target."""

    logprobs: Tensor
    """[N] float32: of each target under softmax(logits / temperature); 0 where the target is ignored."""
    entropy: Tensor | None
    """[N] float32, nats, of that softmax, with gradient; 0 where the target is ignored; None unless asked."""


@dataclass(frozen=True)
class LossParams:
    """What `grpo_loss` computes per token. Aggregation (grpo, dapo, …) lives in its `weights`.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    surrogate: Surrogate = "clipped"
    level: Level = "token"
    """Whether each token has its own ratio, or its sequence's: exp of the masked mean log ratio (GSPO)."""
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    """clipped: the ratio is held in 1 − epsilon_low … 1 + epsilon_high; cispo: its bound is epsilon_high."""
    delta: float | None = None
    """clipped: bound of the ratio in the unclipped branch (two-sided clipping)."""
    beta: float = 0.0
    """Weight of the KL term."""
    kl_bias_correction: bool = False
    """Whether the KL estimate is multiplied by the ratio."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    """sapo: temperatures for advantages above 0, and for the others."""

    def __post_init__(self) -> None:
        surrogates, levels = get_args(Surrogate), get_args(Level)
        check_option("surrogate", self.surrogate, self.surrogate in surrogates, f"one of {', '.join(surrogates)}")
        check_option("level", self.level, self.level in levels, " or ".join(levels))
        for name in ("epsilon_low", "epsilon_high", "beta"):
            value = getattr(self, name)
            check_option(name, value, 0 <= value < math.inf, "a finite number, 0 or more")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            value = getattr(self, name)
            check_option(name, value, 0 < value < math.inf, "a finite number above 0")
        check_option("delta", self.delta, self.delta is None or self.delta > 0, "None or a number above 0")


class LossMetrics(NamedTuple):
    """Detached float32 scalars on the loss's device, to be reduced over micro-batches and ranks.

    Sums and counts add up; without counted tokens, minima and maxima are +inf and −inf. clip_* describe the ratios that
    the surrogate used: one per token or, at sequence level, per sequence with a counted token; `clip_count` is their
    number.
    """

    token_count: Tensor
    kl_sum: Tensor
    """Over tokens; 0 without reference log-probs. Bias-corrected when the loss's is."""
    entropy_sum: Tensor
    """Over tokens; 0 without entropies."""
    clip_count: Tensor
    clip_low_sum: Tensor
    """Ratios below the lower bound at a negative advantage; of the clipped surrogate alone, else 0."""
    clip_high_sum: Tensor
    """Ratios above the upper bound at a positive advantage; always 0 for sapo and reinforce."""
    clip_region_sum: Tensor
    """Low or high."""
    clip_low_seq_min: Tensor
    """Smallest share of low-clipped tokens in a sequence."""
    clip_high_seq_max: Tensor
    """Largest share of high-clipped tokens in a sequence."""


class LossOutput(NamedTuple):
    """Result of `grpo_loss`."""

    loss: Tensor
    """Scalar, differentiable with respect to log-probs and entropies."""
    metrics: LossMetrics


def check_option(name: str, value: object, valid: bool, wanted: str) -> None:
    """Raises the ValueError of an option that cannot work."""
    if not valid:
        raise ValueError(f"{name}={value!r} is not valid: use {wanted}.")


@dataclass(frozen=True, eq=False)
class PagedLayout:
    """Where each decode row's keys and values lie: the pages of a prefix that rows share, then pages of its own.

    The layers of a decode step share one; the next step makes another, rather than change its tensors.
    The rows of prefix p are cu_prefix_rows[p] … cu_prefix_rows[p + 1]. Table entries past a length are never read.
    """

    suffix_tables: Tensor
    """[B, S] int32: pages of each row's own tokens."""
    suffix_lens: Tensor
    """[B] int32: how many tokens those are."""
    prefix_tables: Tensor
    """[P, M] int32: pages of each prefix."""
    prefix_lens: Tensor
    """[P] int32: its tokens; the last page may be partly filled."""
    prefix_ids: Tensor
    """[B] int32: the prefix that a row reads; −1 for a row outside every range of `cu_prefix_rows`: no prefix."""
    cu_prefix_rows: Tensor
    """[P + 1] int32, ascending: first row of each prefix and, last, the end of the last one's; a range may be empty."""
    is_shared: bool = False
    """Whether rows read tokens that other rows write in the same step."""


@dataclass(frozen=True)
class SampleParams:
    """How tokens are drawn, one setting for a batch.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    temperature: float = 1.0
    """0: greedy. The truncations below are then left out."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens whose mass first reaches top_p; 1: all."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens already seen are divided by it where positive, else multiplied; 1: off."""

    def __post_init__(self) -> None:
        check_option("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number, 0 or more")
        check_option("top_k", self.top_k, self.top_k >= 0, "an integer, 0 or more")
        check_option("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        check_option("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        penalty = self.repetition_penalty
        check_option("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number above 0")


class SampleOutput(NamedTuple):
    """What `sample` returns, one entry per row."""

    tokens: Tensor
    """[B] int64."""
    logprobs: Tensor
    """[B] float32: of each token under softmax(logits / temperature), temperature 1 when greedy; nothing left out."""
    sampling_logprobs: Tensor
    """[B] float32: under the distribution drawn from, after suppression, penalty, temperature and truncation. Greedy:
    under the softmax of the suppressed and penalised logits."""
