"""TRL's settings that have no part in our own: those that are refused, and those that are accepted without effect."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

NOT_YET = "A TRL setting that is not supported yet."
IGNORED = "Accepted so that TRL scripts run; has no effect."


def _not_yet(default: Any) -> Any:
    """A field whose other values are refused: ignoring them would train something else."""
    return field(default=default, metadata={"help": NOT_YET})


def _ignored(default: Any) -> Any:
    """A field that is accepted so that scripts keep working, and has no meaning here."""
    return field(default=default, metadata={"help": IGNORED})


@dataclass
class TRLFields:
    """Names and defaults of TRL 1.16."""

    multi_objective_aggregation: str = _not_yet("sum_then_normalize")
    top_entropy_quantile: float = _not_yet(1.0)
    off_policy_mask_threshold: float | None = _not_yet(None)
    entropy_coef: float = _not_yet(0.0)
    use_adaptive_entropy: bool = _not_yet(False)
    cast_lm_head_to_fp32: bool = _not_yet(False)
    generation_kwargs: str | None = _not_yet(None)

    use_vllm: bool = _ignored(False)
    vllm_mode: str = _ignored("colocate")
    vllm_model_impl: str = _ignored("vllm")
    vllm_enable_sleep_mode: bool = _ignored(False)
    vllm_structured_outputs_regex: str | None = _ignored(None)
    vllm_server_base_url: str | None = _ignored(None)
    vllm_server_host: str = _ignored("0.0.0.0")
    vllm_server_port: int = _ignored(8000)
    vllm_server_timeout: float = _ignored(240.0)
    vllm_group_port: int = _ignored(51216)
    vllm_gpu_memory_utilization: float = _ignored(0.3)
    vllm_max_model_length: int | None = _ignored(None)
    vllm_tensor_parallel_size: int = _ignored(1)
    vllm_importance_sampling_correction: bool = _ignored(True)
    vllm_importance_sampling_mode: str = _ignored("sequence_mask")
    vllm_importance_sampling_clip_max: float | None = _ignored(3.0)
    vllm_importance_sampling_clip_min: float | None = _ignored(None)
    use_transformers_continuous_batching: bool = _ignored(False)
    use_transformers_paged: bool = _ignored(False)
    cache_implementation: str | None = _ignored(None)
    ds3_gather_for_generation: bool = _ignored(True)
    pad_to_multiple_of: str | None = _ignored(None)

    def check_trl_fields(self) -> None:
        """Names the ignored settings that were set, in one warning.

        Raises:
            ValueError: a setting that is not supported yet has another value than its default.
        """
        changed = [f for f in fields(TRLFields) if getattr(self, f.name) != f.default]
        for one in changed:
            if one.metadata["help"] == NOT_YET:
                value = getattr(self, one.name)
                raise ValueError(f"{one.name}={value!r} is not supported yet: leave it at {one.default!r}.")
        if changed:
            logger.warning(f"Ignored, the sampler is fastgrpo's own: {', '.join(one.name for one in changed)}.")
