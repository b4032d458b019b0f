"""How completions become micro-batches, rollouts and optimizer steps: the arithmetic of a run's batch sizes."""

import math
from dataclasses import dataclass


class PartialGroupsError(ValueError):
    """A rank's completions are no whole groups."""

    def __init__(self, message: str, completions: int, group: int) -> None:
        super().__init__(message)
        self.completions = completions
        self.group = group


@dataclass(frozen=True)
class BatchPlan:
    """Counts of one rank. A rollout is cut into slices, of which an optimizer step takes one or more; it may be used
    again. Where rollouts and steps do not fit each other, a step takes slices of two rollouts.

    Raises:
        ValueError: sizes that do not divide; the message names the settings and the fix.
    """

    num_generations: int
    """Completions of a prompt."""
    completions_per_micro_batch: int
    accumulation: int
    """Micro-batches of an optimizer step."""
    micro_batches_per_rollout: int
    """Before the rollout is used again."""
    num_iterations: int
    """Times a rollout is trained on."""

    def __post_init__(self) -> None:
        drawn = self.completions_per_micro_batch * self.micro_batches_per_rollout
        if drawn % self.num_generations:
            raise PartialGroupsError(
                f"per_device_train_batch_size={self.completions_per_micro_batch} × {self.micro_batches_per_rollout} "
                f"micro-batches is {drawn} completions a rank, which num_generations={self.num_generations} does not "
                "divide. Make it a multiple, or pass --batch_unit prompts to count prompts instead of completions.",
                drawn,
                self.num_generations,
            )

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that one rank answers in one rollout."""
        return self.completions_per_micro_batch * self.micro_batches_per_rollout // self.num_generations

    @property
    def micro_batches_per_slice(self) -> int:
        return math.gcd(self.accumulation, self.micro_batches_per_rollout)

    @property
    def slices_per_rollout(self) -> int:
        """Of one pass over it."""
        return self.micro_batches_per_rollout // self.micro_batches_per_slice

    @property
    def slices_between_rollouts(self) -> int:
        """Of all passes over one."""
        return self.slices_per_rollout * self.num_iterations

    @property
    def slices_per_step(self) -> int:
        """Of an optimizer step."""
        return self.accumulation // self.micro_batches_per_slice

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps between two rollouts; below 1 where a step takes several."""
        return self.slices_between_rollouts / self.slices_per_step

    @property
    def is_on_policy(self) -> bool:
        """Whether all that a step trains on is drawn by the policy as it is then."""
        return self.slices_per_step % self.slices_between_rollouts == 0
