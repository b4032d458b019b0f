"""GRPO for vision-language models."""

from fastgrpo.config import GRPOConfig
from fastgrpo.training.trainer import GRPOTrainer

__version__ = "0.1.0"

__all__ = ["GRPOConfig", "GRPOTrainer", "__version__"]
