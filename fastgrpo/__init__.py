"""GRPO for vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgrpo.config import GRPOConfig
    from fastgrpo.report.trainer import GRPOTrainer, SFTTrainer
    from fastgrpo.settings.script_arguments import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        TrlParser,
        get_dataset,
        get_kbit_device_map,
        get_peft_config,
        get_quantization_config,
    )
    from fastgrpo.settings.sft_config import SFTConfig

__version__ = "0.1.0"

__all__ = [
    "DatasetMixtureConfig",
    "GRPOConfig",
    "GRPOTrainer",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "TrlParser",
    "__version__",
    "get_dataset",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
]

_MODULES = {
    "GRPOConfig": "fastgrpo.config",
    "GRPOTrainer": "fastgrpo.report.trainer",
    "SFTConfig": "fastgrpo.settings.sft_config",
    "SFTTrainer": "fastgrpo.report.trainer",
}
"""Where a public name is, if not in `fastgrpo.settings.script_arguments`."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: the command line starts without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "fastgrpo.settings.script_arguments")), name)
