"""The settings of the objective, under the names and with the defaults of TRL 1.16."""

from dataclasses import dataclass, fields
from typing import Literal

from transformers.utils import logging

from fastgrpo.settings.limits import option

logger = logging.get_logger(__name__)

LOSS_TYPES: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CORRECTIONS: tuple[str, ...] = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SUMS_OVER_TOKENS = ("bnpo", "dr_grpo", "dapo", "cispo")
"""Loss types that weigh a sequence by its length."""


@dataclass
class ObjectiveSettings:
    """What is trained. How the formulas read: `fastgrpo_kernels.reference`."""

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
    vespo_k_pos: float = option(
        2.0, "VESPO's exponent for positive advantages: less weight to ratios below 1.", at_least=0
    )
    vespo_lambda_pos: float = option(
        3.0, "VESPO's decay for positive advantages: less weight to ratios above 1.", at_least=0
    )
    vespo_k_neg: float = option(3.0, "VESPO's exponent for negative advantages.", at_least=0)
    vespo_lambda_neg: float = option(2.0, "VESPO's decay for negative advantages.", at_least=0)
    mask_truncated_completions: bool = option(False, "Leave completions cut at max_completion_length out of the loss.")
    off_policy_mask_threshold: float | None = option(
        None, "Drop bad completions that the policy has moved away from by more nats a token (DeepSeek-V3.2).", above=0
    )
    top_entropy_quantile: float = option(
        1.0, "Share of a step's tokens, those of highest entropy, that move the policy.", at_least=0, at_most=1
    )
    router_aux_loss_coef: float | None = option(
        None, "Weight of a mixture of experts' load-balancing loss; the model's own if unset.", at_least=0
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus; the first one where it is adaptive.")
    use_adaptive_entropy: bool = option(
        False, "Raise entropy_coef while entropy is at or below entropy_target, else lower it (Skywork-OR1)."
    )
    entropy_coef_min: float = option(0.0, "Its lower bound.")
    entropy_coef_max: float = option(1.0, "Its upper bound.")
    entropy_coef_delta: float = option(0.005, "What it is moved by at each optimizer step.", at_least=0)
    entropy_target: float = option(0.2, "Nats a token; at more the bonus is off.", at_least=0)
    reward_weights: list[float] | None = option(None, "One weight per reward function; all 1 if unset.")
    nan_rewards: str = option(
        "raise", "A reward that is not finite ends the run, or is taken for None.", choices=("raise", "abstain")
    )
    reward_timeout: float | None = option(None, "Seconds that a reward function may take; unlimited if unset.", above=0)
    scale_rewards: str = option(
        "group",
        "Divide advantages by the deviation of rewards in the group, batch, or none.",
        choices=("group", "batch", "none"),
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize",
        "Sum the rewards and normalise the sum, or normalise each and sum (GDPO).",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )
    cast_lm_head_to_fp32: bool = option(False, "Compute the LM head of policy and reference in float32 (ScaleRL).")

    use_vllm: bool = option(
        False, "The sampler stays our own. Corrects the loss by the ratio of trainer to sampler, as TRL with vLLM does."
    )
    vllm_importance_sampling_correction: bool = option(True, "With use_vllm: whether it does.")
    vllm_importance_sampling_mode: str = option(
        "sequence_mask",
        "With use_vllm: a ratio per token or sequence, outside its bounds truncated to them or masked out.",
        choices=CORRECTIONS,
    )
    vllm_importance_sampling_clip_max: float | None = option(3.0, "With use_vllm: the ratio's upper bound.", at_least=0)
    vllm_importance_sampling_clip_min: float | None = option(None, "With use_vllm: its lower bound.", at_least=0)
    vllm_importance_sampling_cap: float | None = option(
        None, "Older name of vllm_importance_sampling_clip_max.", at_least=0
    )

    @property
    def corrects_sampling(self) -> bool:
        """Whether the loss is multiplied by the ratio of the trainer's to the sampler's probabilities."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    def check_objective(self) -> None:
        """Warns of combinations that are seldom meant.

        Raises:
            ValueError: settings that cannot work together.
        """
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        for name in ("sync_ref_model", "ref_model_on_cpu"):
            if getattr(self, name) and self.beta == 0:
                raise ValueError(f"{name}=True, but with beta=0.0 there is no reference: set beta above 0.")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} is not valid: use a number below "
                f"vllm_importance_sampling_clip_max={high}."
            )
        mode = self.vllm_importance_sampling_mode
        if self.vllm_importance_sampling_correction and mode.endswith("truncate") and low is high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={mode!r} has nothing to truncate to: set "
                "vllm_importance_sampling_clip_max or _min."
            )
        if self.loss_type == "vespo" and self.corrects_sampling and mode.startswith("sequence"):
            raise ValueError(
                f"vllm_importance_sampling_mode={mode!r} does not go with loss_type='vespo', whose weights are per "
                "sequence already: use token_truncate or token_mask."
            )
        if not 0 <= self.entropy_coef_min <= self.entropy_coef_max:
            raise ValueError(
                f"entropy_coef_min={self.entropy_coef_min} is not valid: use a number from 0 to "
                f"entropy_coef_max={self.entropy_coef_max}."
            )
        unused = [name for name in OF_CORRECTION if getattr(self, name) != getattr(ObjectiveSettings, name)]
        if unused and not self.use_vllm:
            logger.warning(f"{', '.join(unused)}: no effect without use_vllm, as in TRL.")
        self._warn_of_levels()

    def _warn_of_levels(self) -> None:
        by_sequence = self.importance_sampling_level == "sequence"
        if self.loss_type == "luspo" and not by_sequence:
            logger.warning("loss_type=luspo is published with importance_sampling_level=sequence, and this is token.")
        if self.loss_type == "vespo" and by_sequence:
            logger.warning(
                "loss_type=vespo weighs whole sequences itself: importance_sampling_level=sequence changes its KL term "
                "alone. Use token."
            )
        if by_sequence and self.loss_type in SUMS_OVER_TOKENS:
            logger.warning(
                f"importance_sampling_level=sequence with loss_type={self.loss_type}, which sums over tokens, "
                "weights each sequence by its completion length. GSPO is loss_type=grpo."
            )


OF_CORRECTION = [one.name for one in fields(ObjectiveSettings) if one.name.startswith("vllm_importance_sampling_")]
"""Settings of the correction by the sampler's ratio."""
