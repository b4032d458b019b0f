"""The typed records that travel from stage to stage, and the two interfaces the trainer drives.

row → Prompt → Engine.generate → Rollout → rewards → ScoredRollout → advantages → token weights
→ TrainingGroup → Updater.accumulate
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from fastgrpo_kernels import LossMetrics
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


class SamplingMismatch(NamedTuple):
    """How far the policy's log-probs are from those the tokens were drawn with; scalars over counted tokens."""

    token_count: Tensor
    difference_sum: Tensor
    """Σ |log π − log of the sampling distribution|."""
    difference_max: Tensor
    ratio_count: Tensor
    """How many ratios there are: one per token or, where the loss is corrected by them so, one per sequence."""
    ratio_sum: Tensor
    """Σ exp(log π − log of the sampling distribution), or of the ratios that correct the loss."""
    ratio_min: Tensor
    ratio_max: Tensor


class ObjectiveTerms(NamedTuple):
    """What terms of the objective came to that not every run has; scalars."""

    sequence_count: Tensor
    """Completions with a counted token."""
    vespo_sum: Tensor
    """Σ of VESPO's weights over them; 0 in other losses."""
    bonus_sum: Tensor
    """The entropy bonus that the loss was lowered by."""
    router_sum: Tensor
    """The mean load-balancing loss, this rank's share of it; 0 where none is added."""


class RowError(ValueError):
    """A data row that cannot become a prompt: corrupt image, answer not among the options, prompt too long.

    Such rows are reported with their index, counted and left out; they never end a run unless every row is bad.
    """


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out, and why."""

    row_id: int
    reason: str


@dataclass(frozen=True)
class Prompt:
    """A row ready for the model. Built once, in `fastgrpo.data`; nobody downstream touches a processor."""

    row_id: int
    """Index of the row in its data set; part of every completion's random seed."""
    input_ids: Tensor
    """[P] int64, image placeholders expanded to one token per merged patch."""
    position_ids: Tensor
    """[3, P] int64, M-RoPE positions (temporal, height, width); of a model with 1-D positions those, thrice."""
    pixel_values: Tensor | None
    """[patches of all images, patch_dim] or [tiles of all images, 3, H, W] float32, or None for a text-only row."""
    image_grid_thw: Tensor | None
    """[images, 3] int64, each image's patch grid (time, height, width), or what its style says
    (`model/picture_styles.py`); or None."""
    text: str
    """The rendered prompt, image placeholders included: what a report shows."""
    messages: list[dict[str, Any]] | None = None
    """The conversation a chat prompt was rendered from; None for a plain-text (base mode) prompt."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, handed to reward functions by name."""
    thumbnail: bytes | None = None
    """The row's pictures side by side, JPEG, at most 224 px high: for logs and reports only."""
    image_digests: tuple[bytes, ...] = ()
    """Of each image, a hash of its pixels and grid, by which features of a frozen vision tower are kept; or empty."""
    images: tuple[Any, ...] = ()
    """The row's pictures as PIL images, in the order of their places in `messages`: reward functions see them."""


@dataclass(frozen=True)
class PromptBatch:
    """One optimizer step's prompts on one rank, and the rows that were left out while building them."""

    prompts: list[Prompt]
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. `temperature` 0 is greedy; top_k 0, top_p 1, min_p 0 switch those filters off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """The run's seed; a completion's own seed also hashes step, row_id and completion index."""


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    row_id: int
    index: int
    """0..G-1 within its group."""
    token_ids: Tensor
    """[C] int64, the end token included when one was drawn."""
    text: str
    """Decoded without special tokens."""
    finish_reason: FinishReason
    logprobs: Tensor
    """[C] float32: of each token under the tempered full softmax (no truncation, penalty or suppression)."""
    sampling_logprobs: Tensor
    """[C] float32: of each token under the distribution it was actually drawn from."""
    own_tokens: Tensor | None = None
    """[C] bool: the tokens that the policy wrote, where an environment wrote others; None where it wrote all."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What else a rollout function says of it, handed to reward functions by name."""
    messages: list[dict[str, Any]] | None = None
    """The turns it consists of, where tools answer; None: one turn of the assistant's."""
    tool_calls: tuple[int, int] | None = None
    """How many tools it called, and how many of these calls failed; None where there are no tools."""
    whole: Prompt | None = None
    """Where tools answered with pictures: the prompt and all tokens but the last, which predicts nothing, with every
    picture."""
    ref_logprobs: Tensor | None = None
    """[C] float32: of each token under the KL term's frozen reference; None: not asked yet, or not needed."""


class Rollout(NamedTuple):
    """A prompt and its G completions, by rising index."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout and what the reward functions said of its completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: Tensor
    """[G, F] float32, one column per reward function; NaN where a function abstained (returned None)."""


@dataclass(frozen=True)
class TrainingGroup:
    """A prompt and its completions with everything the loss needs but the model: input of `Updater.accumulate`.

    The update minimises Σ_groups Σ_g Σ_t token_weights[g][t] · ℓ(g, t), so aggregation (grpo, bnpo, dr_grpo,
    dapo, …) is already decided and does not depend on how the tokens are batched.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    advantages: Tensor
    """[G] float32."""
    token_weights: tuple[Tensor, ...]
    """G tensors [C] float32."""
    masks: tuple[Tensor, ...]
    """G tensors [C] bool: the tokens that count, in the loss and in the metrics."""
    old_logprobs: tuple[Tensor, ...] | None = None
    """G tensors [C] float32: π_old, or None for "the current policy's, detached" (one update per rollout)."""
    policy_scale: tuple[Tensor, ...] | None = None
    """G tensors [C] float32: multiplies the surrogate, not the KL term; None: 1."""
    entropy_weights: tuple[Tensor, ...] | None = None
    """G tensors [C] float32: the loss is lowered by their product with the tokens' entropies. Where they are given,
    every completion takes part in the update, whatever its advantage."""


@dataclass(frozen=True)
class Example:
    """A row to imitate: its tokens, and which of them the loss of supervised fine-tuning counts."""

    prompt: Prompt
    """Of the whole row but its last token, which predicts nothing."""
    rows: Tensor
    """[N] int64, rising: the tokens of `prompt` whose next token counts."""
    targets: Tensor
    """[N] int64: those next tokens."""


@dataclass(frozen=True)
class ExampleBatch:
    """One optimizer step's examples on one rank, and the rows that were left out while building them."""

    examples: list[Example]
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass(frozen=True)
class UpdateResult:
    """What one pass over an optimizer step's groups gives back, still on the device."""

    loss: Tensor
    """Scalar float32: this rank's share of the objective; the ranks' shares add up to it."""
    metrics: LossMetrics
    """Sums over this rank's tokens."""
    mismatch: SamplingMismatch
    """The log-probs of the policy that drew the tokens, as the update computes them, against the sampler's."""
    terms: ObjectiveTerms


class Engine(Protocol):
    """Draws completions: the paged sampler, or the plain engine around HF `generate`."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams, step: int
    ) -> Iterator[Rollout]:
        """Yields each prompt with its finished group, in any order, so that rewards start while others run.

        `step` enters the completions' seeds. Draws from the weights of the last `sync`, which comes first.
        """
        ...

    def sync(self) -> None:
        """Takes over the policy's weights as they are now; under ZeRO-3 on all ranks together."""
        ...


class Updater(Protocol):
    """Accumulates gradients of the GRPO objective on the trained model. The caller clips, steps and schedules."""

    model: Any
    """What the forward pass calls; the trainer puts the module wrapped in DDP or DeepSpeed here."""

    def with_reference(self, rollouts: Sequence[Rollout], masks: Sequence[Tensor]) -> list[Rollout]:
        """The rollouts with `ref_logprobs`, which need no rewards; without where `accumulate` is to ask for them.

        `masks`: per completion, [C] bool, the tokens that count; one without any is left as it is. On all ranks
        together.
        """
        ...

    def logprobs(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """Per group, G tensors [C] float32: the current policy's log-probs, without gradient (π_old)."""
        ...

    def entropies(self, groups: Sequence[TrainingGroup]) -> list[tuple[Tensor, ...]]:
        """Per group, G tensors [C] float32: the current policy's entropies, without gradient."""
        ...

    def accumulate(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """Adds the objective's gradient to every parameter's `.grad`; reads nothing back from the device."""
        ...

    def measure(self, groups: Sequence[TrainingGroup]) -> UpdateResult:
        """What `accumulate` would give, without gradients and through no wrapper; on all ranks together."""
        ...
