"""The loss of a micro-batch, from the log-probs of its tokens: the same for packed and for padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from fastgrpo_kernels import (
    ImportanceCorrection,
    LossMetrics,
    LossParams,
    VespoParams,
    grpo_loss,
    importance_ratio,
    off_policy_mask,
    vespo_weights,
)
from torch import Tensor

from fastgrpo.types import ObjectiveTerms, SamplingMismatch, UpdateResult
from fastgrpo.update.sums import combine, sampling_mismatch


@dataclass(frozen=True)
class Scaling:
    """What the surrogate is multiplied by, beside the groups' own `policy_scale`."""

    correction: ImportanceCorrection | None = None
    """Multiplies by the ratio of the trainer's to the sampler's probabilities."""
    off_policy_threshold: float | None = None
    """Drops bad completions that the policy has moved away from further than this."""
    from_sampler: bool = False
    """Whether that is measured from the sampler's log-probs, or from π_old."""
    vespo: VespoParams | None = None
    """Multiplies by VESPO's weights, which take the importance ratio in."""


class LossInputs(Protocol):
    """N tokens of S completions, one after the other."""

    @property
    def advantages(self) -> Tensor:
        """[S] float32."""

    @property
    def weights(self) -> Tensor:
        """[N] float32."""

    @property
    def mask(self) -> Tensor:
        """[N] bool."""

    @property
    def cu_seqlens(self) -> Tensor:
        """[S + 1] int64."""

    @property
    def sampling_logprobs(self) -> Tensor:
        """[N] float32."""

    @property
    def old_logprobs(self) -> Tensor | None:
        """[N] float32."""

    @property
    def policy_scale(self) -> Tensor | None:
        """[N] float32."""

    @property
    def entropy_weights(self) -> Tensor | None:
        """[N] float32."""


class MicroBatchResult(NamedTuple):
    """A micro-batch's share of the loss, with gradient, and its sums."""

    loss: Tensor
    metrics: LossMetrics
    mismatch: SamplingMismatch
    terms: ObjectiveTerms


def micro_loss(
    logprobs: Tensor,
    entropy: Tensor,
    batch: LossInputs,
    params: LossParams,
    scaling: Scaling,
    ref_logprobs: Tensor | None,
) -> MicroBatchResult:
    """The loss of [N] tokens, from their log-probs and entropies under the policy, with gradient."""
    current = logprobs.detach()
    drawn = current if batch.old_logprobs is None else batch.old_logprobs
    layout = batch.cu_seqlens, batch.mask
    counts = torch.zeros_like(batch.advantages).index_add(0, (owner := _owners(batch)), batch.mask.float())
    factors = [] if batch.policy_scale is None else [batch.policy_scale]
    ratio = weights = None
    if scaling.correction is not None:
        ratio = importance_ratio(drawn, batch.sampling_logprobs, *layout, scaling.correction)
        if scaling.vespo is None:
            factors.append(ratio[owner] if scaling.correction.level == "sequence" else ratio)
    if scaling.off_policy_threshold is not None:
        reference = batch.sampling_logprobs if scaling.from_sampler else drawn
        kept = off_policy_mask(current, reference, batch.advantages, *layout, scaling.off_policy_threshold)
        factors.append(kept[owner].float())
    if scaling.vespo is not None:
        weights = vespo_weights(current, drawn, batch.advantages, *layout, scaling.vespo, ratio)
        factors.append(weights[owner])
    output = grpo_loss(
        logprobs,
        batch.advantages,
        batch.weights,
        batch.cu_seqlens,
        params,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=batch.mask,
        policy_scale=torch.stack(factors).prod(dim=0) if factors else None,
        entropy=entropy if batch.entropy_weights is not None else entropy.detach(),
        entropy_weights=batch.entropy_weights,
    )
    nothing = current.new_zeros(())
    among = counts > 0 if scaling.correction is not None and scaling.correction.level == "sequence" else batch.mask
    bonus = batch.entropy_weights
    terms = ObjectiveTerms(
        (counts > 0).sum(),
        nothing if weights is None else torch.where(counts > 0, weights, 0.0).sum(),
        nothing if bonus is None else torch.where(batch.mask, bonus * entropy.detach(), 0.0).sum(),
        nothing,
    )
    mismatch = sampling_mismatch(drawn, batch.sampling_logprobs, batch.mask, ratio, among)
    return MicroBatchResult(output.loss, output.metrics, mismatch, terms)


def with_router_loss(
    result: MicroBatchResult, caught: Sequence[Tensor], weight: float, share: float
) -> MicroBatchResult:
    """Adds a mixture of experts' load-balancing loss, if one was `caught`, times `weight`.

    Args:
        share: of the micro-batch, among all of the optimizer step's on all ranks.
    """
    if not caught:
        return result
    balance = share * caught[0]
    terms = result.terms._replace(router_sum=balance.detach())
    return result._replace(loss=result.loss + weight * balance, terms=terms)


def _owners(batch: LossInputs) -> Tensor:
    """[N] int64, the completion that each token belongs to."""
    lengths = batch.cu_seqlens.diff()
    indices = torch.arange(len(lengths), device=lengths.device)
    return indices.repeat_interleave(lengths, output_size=len(batch.mask))


def update_result(outputs: Sequence[MicroBatchResult], device: torch.device) -> UpdateResult:
    """Combines the micro-batches' results; without any, the result of no completions."""
    if not outputs:
        none = torch.zeros(0, device=device)
        lengths = torch.zeros(1, dtype=torch.int64, device=device)
        output = grpo_loss(none, none, none, lengths, LossParams())
        terms = ObjectiveTerms(*torch.zeros(len(ObjectiveTerms._fields), device=device).unbind())
        outputs = [MicroBatchResult(*output, sampling_mismatch(none, none, none.bool()), terms)]
    return UpdateResult(
        torch.stack([output.loss.detach() for output in outputs]).sum(),
        combine([output.metrics for output in outputs]),
        combine([output.mismatch for output in outputs]),
        combine([output.terms for output in outputs]),
    )
