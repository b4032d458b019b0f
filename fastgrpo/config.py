"""`GRPOConfig`: the settings of a run plus those of GRPO, under the names TRL 1.16 gives them."""

from dataclasses import dataclass
from typing import Literal

from fastgrpo.batch_plan import BatchPlan
from fastgrpo.limits import option
from fastgrpo.run_config import RunConfig
from fastgrpo.trl_fields import TRLFields

LOSS_TYPES: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")


@dataclass
class GRPOConfig(TRLFields, RunConfig):
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
        None, "Micro-batches per rollout; gradient_accumulation_steps if unset, else a multiple of it.", at_least=1
    )
    num_iterations: int = option(1, "Times each rollout is trained on.", at_least=1)
    temperature: float = option(1.0, "Sampling temperature.", above=0)
    top_p: float = option(1.0, "Nucleus sampling; 1 is off.", above=0, at_most=1)
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 is off.", at_least=0)
    min_p: float | None = option(
        None, "Drop tokens less likely than min_p times the likeliest; None is off.", at_least=0, at_most=1
    )
    repetition_penalty: float = option(1.0, "Above 1 discourages tokens already in the text.", above=0)

    # Objective
    loss_type: str = option(
        "dapo", "How token losses are aggregated: " + ", ".join(LOSS_TYPES) + ".", choices=LOSS_TYPES
    )
    beta: float = option(0.0, "Weight of the KL term; at 0 no reference model is kept.", at_least=0)
    sync_ref_model: bool = option(False, "Draw the reference model after the policy (TR-DPO).")
    ref_model_on_cpu: bool = option(
        False, "Keep the reference model's weights on the host and run it there: frees its GPU memory, and is slow."
    )
    ref_model_mixup_alpha: float = option(
        0.6, "Share of the policy in the reference at each such update.", above=0, at_most=1
    )
    ref_model_sync_steps: int = option(512, "Optimizer steps between them.", at_least=1)
    epsilon: float = option(0.2, "Lower clipping range of the probability ratio.", at_least=0)
    epsilon_high: float | None = option(None, "Upper clipping range; epsilon if unset.", at_least=0)
    delta: float | None = option(None, "Upper bound of the unclipped ratio (two-sided clipping).", above=0)
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio per token, or sequence (GSPO).", choices=("token", "sequence")
    )
    use_bias_correction_kl: bool = option(True, "Multiply the KL estimate by the probability ratio.")
    sapo_temperature_neg: float = option(1.05, "SAPO's temperature for negative advantages.", above=0)
    sapo_temperature_pos: float = option(1.0, "SAPO's temperature for positive advantages.", above=0)
    mask_truncated_completions: bool = option(False, "Leave completions cut at max_completion_length out of the loss.")
    reward_weights: list[float] | None = option(None, "One weight per reward function; all 1 if unset.")
    nan_rewards: str = option(
        "raise", "A reward that is not finite ends the run, or is taken for None.", choices=("raise", "abstain")
    )
    scale_rewards: str = option(
        "group",
        "Divide advantages by the deviation of rewards in the group, batch, or none.",
        choices=("group", "batch", "none"),
    )

    # Logging
    log_completions: bool = option(True, "Write every completion to output_dir/completions (parquet).")
    log_multimodal: bool = option(True, "Keep a thumbnail of each prompt's pictures in that log.")
    num_completions_to_print: int | None = option(None, "Completions to print at each log; none if unset.", at_least=0)

    def __post_init__(self) -> None:
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss"):
            self.metric_for_best_model: str = "reward"
            self.greater_is_better: bool = True
        super().__post_init__()
        self.check_trl_fields()
        for name in ("sync_ref_model", "ref_model_on_cpu"):
            if getattr(self, name) and self.beta == 0:
                raise ValueError(f"{name}=True, but with beta=0.0 there is no reference: set beta above 0.")

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
    def longest(self) -> tuple[int | None, int]:
        """Most tokens of a prompt (None: not bounded) and of its completion."""
        return self.max_prompt_length, self.max_completion_length
