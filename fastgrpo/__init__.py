"""GRPO for vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgrpo.config import GRPOConfig
    from fastgrpo.report.trainer import GRPOTrainer, SFTTrainer
    from fastgrpo.sft_config import SFTConfig

__version__ = "0.1.0"

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer", "__version__"]

_MODULES = {
    "GRPOConfig": "fastgrpo.config",
    "GRPOTrainer": "fastgrpo.report.trainer",
    "SFTConfig": "fastgrpo.sft_config",
    "SFTTrainer": "fastgrpo.report.trainer",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: the command line starts without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
