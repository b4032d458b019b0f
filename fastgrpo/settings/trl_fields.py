"""TRL's settings that have no part in our own: accepted with a warning that says what happens instead, or refused."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers.utils import logging

from fastgrpo.settings.objective_settings import OF_CORRECTION
from fastgrpo.settings.trl_settings import MAPPED, REFUSED, STATED_OFF

logger = logging.get_logger(__name__)


def _foreign(name: str, default: Any) -> Any:
    return field(default=default, metadata={"help": MAPPED.get(name) or f"Refused: {REFUSED[name]}."})


@dataclass
class TRLFields:
    """Names and defaults of TRL 1.16."""

    vllm_structured_outputs_regex: str | None = _foreign("vllm_structured_outputs_regex", None)

    vllm_mode: str = _foreign("vllm_mode", "colocate")
    vllm_model_impl: str = _foreign("vllm_model_impl", "vllm")
    vllm_enable_sleep_mode: bool = _foreign("vllm_enable_sleep_mode", False)
    vllm_server_base_url: str | None = _foreign("vllm_server_base_url", None)
    vllm_server_host: str = _foreign("vllm_server_host", "0.0.0.0")
    vllm_server_port: int = _foreign("vllm_server_port", 8000)
    vllm_server_timeout: float = _foreign("vllm_server_timeout", 240.0)
    vllm_group_port: int = _foreign("vllm_group_port", 51216)
    vllm_gpu_memory_utilization: float = _foreign("vllm_gpu_memory_utilization", 0.3)
    vllm_max_model_length: int | None = _foreign("vllm_max_model_length", None)
    vllm_tensor_parallel_size: int = _foreign("vllm_tensor_parallel_size", 1)
    use_transformers_continuous_batching: bool = _foreign("use_transformers_continuous_batching", False)
    transformers_continuous_batching_config: dict[str, Any] | str | None = _foreign(
        "transformers_continuous_batching_config", None
    )
    use_transformers_paged: bool = _foreign("use_transformers_paged", False)
    cache_implementation: str | None = _foreign("cache_implementation", None)
    ds3_gather_for_generation: bool = _foreign("ds3_gather_for_generation", True)
    pad_to_multiple_of: str | None = _foreign("pad_to_multiple_of", "auto")

    def refuse_unsupported(self) -> None:
        """Called before transformers rewrites any value.

        Raises:
            ValueError: a setting that is not supported asks for something.
        """
        for name, value in self._changed(REFUSED).items():
            raise ValueError(f"{name}={value!r}: {REFUSED[name]}.")

    def tell_of_mapped(self) -> None:
        """One warning of the settings that were set and do something else here than in TRL."""
        changed = self._changed(MAPPED)
        names_of = {
            note: [name for name in changed if MAPPED[name] == note] for note in map(MAPPED.__getitem__, changed)
        }
        if names_of:
            told = "; ".join(f"{', '.join(names)}: {note.rstrip('.')}" for note, names in names_of.items())
            logger.warning(f"Settings of TRL that work differently here. {told}.")

    def _changed(self, names: dict[str, str]) -> dict[str, Any]:
        """Those among `names` that ask for something else than their default."""
        known = {one.name: one for one in fields(self) if one.name in names}
        values = {name: getattr(self, name) for name in known}
        same = {name: (_default(known[name]), *STATED_OFF.get(name, ())) for name in known}
        return {name: value for name, value in values.items() if value not in same[name]}


def _default(one: Any) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


FOREIGN = frozenset([*OF_CORRECTION, *(one.name for one in fields(TRLFields))])
"""Settings that are there for TRL's sake."""
