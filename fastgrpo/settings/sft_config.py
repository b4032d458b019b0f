"""`SFTConfig`: the settings of a run plus those of supervised fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from fastgrpo.settings.batch_plan import BatchPlan
from fastgrpo.settings.limits import option
from fastgrpo.settings.run_config import RunConfig


@dataclass
class SFTConfig(RunConfig):
    """Settings of supervised fine-tuning (SFT). `per_device_train_batch_size` counts rows.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    learning_rate: float = option(2e-5, "Peak learning rate.", at_least=0)
    prompt_mode: Literal["base", "instruct"] = option(
        "instruct",
        "`instruct`: questions in the model's chat template; `base`: in plain text without roles.",
        choices=("base", "instruct"),
    )
    prompt_template: Literal["direct", "paper", "answer"] = option(
        "direct",
        "Wording of questions: without reasoning, or as `fastgrpo train` asks them, for answers that hold reasoning.",
        choices=("direct", "paper", "answer"),
    )
    train_on_prompt: bool = option(False, "Count the prompt's text in the loss too; image tokens never count.")
    max_length: int | None = option(
        None, "Rows of more tokens, answer included, are skipped and counted; never truncated.", at_least=1
    )

    @property
    def batch_plan(self) -> BatchPlan:
        """Rows as prompts with one completion each, a step's rows at a time."""
        return BatchPlan(
            num_generations=1,
            completions_per_micro_batch=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            micro_batches_per_rollout=self.gradient_accumulation_steps,
            num_iterations=1,
        )

    @property
    def longest(self) -> tuple[int | None, int]:
        """Most tokens of a row, answer included; None: not bounded."""
        return self.max_length, 0
