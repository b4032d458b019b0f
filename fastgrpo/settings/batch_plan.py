"""How completions become micro-batches, rollouts and optimizer steps: the arithmetic of a run's batch sizes."""

from dataclasses import dataclass


class PartialGroupsError(ValueError):
    """A rank's completions are no whole groups."""

    def __init__(self, message: str, completions: int, group: int) -> None:
        super().__init__(message)
        self.completions = completions
        self.group = group


@dataclass(frozen=True)
class BatchPlan:
    """Counts of one rank. A rollout is cut into slices, each the batch of one optimizer step, and may be used again.

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
                f"accumulated is {drawn} completions a rank, which num_generations={self.num_generations} does not "
                "divide. Make it a multiple, or pass --batch_unit prompts to count prompts instead of completions.",
                drawn,
                self.num_generations,
            )
        assert self.micro_batches_per_rollout % self.accumulation == 0, "see whole_steps"

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that one rank answers in one rollout."""
        return self.completions_per_micro_batch * self.micro_batches_per_rollout // self.num_generations

    @property
    def slices_per_rollout(self) -> int:
        """Optimizer steps that one pass over a rollout takes."""
        return self.micro_batches_per_rollout // self.accumulation

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.slices_per_rollout * self.num_iterations


def whole_steps(micro_batches: int, accumulation: int, completions: int, num_generations: int) -> int:
    """The least number of micro-batches from `micro_batches` on that makes whole optimizer steps and whole groups.

    Where `micro_batches` of so many completions are no whole groups already, whole steps alone: `BatchPlan` says so.
    """
    steps = -(-micro_batches // accumulation)
    if micro_batches * completions % num_generations == 0:
        while steps * accumulation * completions % num_generations:
            steps += 1
    return steps * accumulation
