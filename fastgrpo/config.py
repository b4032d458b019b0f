"""`GRPOConfig`: the settings of a run plus those of GRPO, under the names TRL 1.16 gives them."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils import logging

from fastgrpo.settings.batch_plan import BatchPlan
from fastgrpo.settings.limits import limits_of, option
from fastgrpo.settings.objective_settings import LOSS_TYPES, ObjectiveSettings
from fastgrpo.settings.run_config import RunConfig, parsed
from fastgrpo.settings.trl_fields import TRLFields

__all__ = ["LOSS_TYPES", "GRPOConfig"]

logger = logging.get_logger(__name__)

GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""What `generation_kwargs` may hold."""
OF_BEAMS = ("num_beams", "num_beam_groups", "length_penalty", "diversity_penalty", "early_stopping")
"""Accepted there, with a warning."""


@dataclass
class GRPOConfig(TRLFields, ObjectiveSettings, RunConfig):
    """Settings of a GRPO run. Counts, lengths and batch sizes are in completions and tokens unless said otherwise.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    learning_rate: float = option(1e-6, "Peak learning rate.", at_least=0)
    prompt_template: Literal["paper", "answer"] = option(
        "paper",
        "Wording of the base prompt: the paper's, or one that also names the <answer> tag.",
        choices=("paper", "answer"),
    )
    max_prompt_length: int | None = option(
        None, "Rows whose prompt has more tokens are skipped and counted; never truncated.", at_least=1
    )

    # Rollouts
    num_generations: int = option(8, "Completions per prompt (the group size G), at least 2.", at_least=2)
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; num_generations if unset.", at_least=1
    )
    max_completion_length: int = option(512, "Most tokens in a completion.", at_least=1)
    batch_unit: Literal["completions", "prompts"] = option(
        "completions",
        "What per_device_train_batch_size counts: completions (TRL) or prompts (VisualThinker).",
        choices=("completions", "prompts"),
    )
    generation_batch_size: int | None = option(None, "Completions drawn at once over all ranks.", at_least=1)
    steps_per_generation: int | None = option(
        None, "Micro-batches per rollout; gradient_accumulation_steps if unset.", at_least=1
    )
    num_iterations: int = option(1, "Times each rollout is trained on.", at_least=1)
    temperature: float = option(1.0, "Sampling temperature.", above=0)
    top_p: float = option(1.0, "Nucleus sampling; 1 is off.", above=0, at_most=1)
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 is off.", at_least=0)
    min_p: float | None = option(
        None, "Drop tokens less likely than min_p times the likeliest; None is off.", at_least=0, at_most=1
    )
    repetition_penalty: float = option(1.0, "Above 1 discourages tokens already in the text.", above=0)
    max_tool_calling_iterations: int | None = option(
        None, "Turns of a completion in which it may call tools; as many as fit if unset.", at_least=0
    )
    generation_kwargs: dict[str, Any] | str | None = option(
        None, "Sampling settings that override those above in rollouts (JSON): " + ", ".join(GENERATION_KEYS) + "."
    )

    # Logging
    log_completions: bool = option(True, "Write every completion to output_dir/completions (parquet).")
    log_multimodal: bool = option(True, "Keep a thumbnail of each prompt's pictures in that log.")
    num_completions_to_print: int | None = option(None, "Completions to print at each log; none if unset.", at_least=0)
    log_unique_prompts: bool = option(False, "Print one completion of each prompt.")
    log_completions_hub_repo: str | None = option(
        None, "A dataset repository on the hub that the completions log is uploaded to every two minutes."
    )

    def __post_init__(self) -> None:
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss"):
            self.metric_for_best_model: str = "reward"
            self.greater_is_better: bool = True
        self.refuse_unsupported()
        self.tell_of_mapped()  # before transformers rewrites them
        self.include_num_input_tokens_seen = "no"  # transformers would look for them in our prompts
        super().__post_init__()
        self.check_objective()
        _ = self.generation_settings  # raises when it cannot be read
        if beams := [name for name in parsed("generation_kwargs", self.generation_kwargs) if name in OF_BEAMS]:
            logger.warning(f"generation_kwargs: {', '.join(beams)}: no effect, since nothing is searched for.")
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError("log_completions_hub_repo is set, but log_completions is off: turn it on, or unset it.")

    # transformers reads these fields from JSON when they come from the command line.
    _VALID_DICT_FIELDS = (*RunConfig._VALID_DICT_FIELDS, "generation_kwargs")

    @property
    def generation_settings(self) -> dict[str, Any]:
        """`generation_kwargs` as parsed."""
        settings = parsed("generation_kwargs", self.generation_kwargs)
        unknown = settings.keys() - {*GENERATION_KEYS, *OF_BEAMS, "do_sample"}
        if not settings.get("do_sample", True):
            unknown.add("do_sample=False")
        if unknown:
            raise ValueError(
                f"generation_kwargs: the sampler has no {', '.join(sorted(unknown))}: use {', '.join(GENERATION_KEYS)}."
            )
        found = {name: settings[name] for name in GENERATION_KEYS if name in settings}
        for name, value in found.items():
            limits = limits_of(self, "max_completion_length" if name == "max_new_tokens" else name)
            if limits and not limits.allow(value):
                raise ValueError(f"generation_kwargs: {name}={value!r} is not valid: use {limits}.")
        return found

    @property
    def batch_plan(self) -> BatchPlan:
        """How completions become micro-batches, rollouts and optimizer steps."""
        completions = self.per_device_train_batch_size * (self.num_generations if self.batch_unit == "prompts" else 1)
        per_micro_batch = completions * self.world_size
        if self.generation_batch_size is None:
            micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        elif self.steps_per_generation is not None or self.generation_batch_size % per_micro_batch:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size}: make it a multiple of the {per_micro_batch} "
                "completions of a micro-batch over all ranks, and leave steps_per_generation unset."
            )
        else:
            micro_batches = self.generation_batch_size // per_micro_batch
        return BatchPlan(
            num_generations=self.num_generations,
            completions_per_micro_batch=completions,
            accumulation=self.gradient_accumulation_steps,
            micro_batches_per_rollout=micro_batches,
            num_iterations=self.num_iterations,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model's log-probs enter the loss."""
        return self.beta > 0

    @property
    def needs_entropies(self) -> bool:
        """Whether an update needs every token's entropy before its gradients."""
        return self.top_entropy_quantile < 1

    @property
    def longest(self) -> tuple[int | None, int]:
        """Most tokens of a prompt (None: not bounded) and of its completion."""
        return self.max_prompt_length, self.max_completion_length
