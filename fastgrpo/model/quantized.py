"""Weights of 4 or 8 bits (bitsandbytes), to train adapters on (QLoRA, arXiv 2305.14314)."""

from importlib.util import find_spec
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fastgrpo.settings.run_config import RunConfig


def quantized_loading(quantization_config: Any, config: RunConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that a trainer's `quantization_config` stands for; none for None.

    Raises:
        ValueError: bitsandbytes or a CUDA device is missing, or the setting is given twice.
    """
    if quantization_config is None:
        return {}
    if "quantization_config" in config.model_kwargs:
        raise ValueError("quantization_config is in model_init_kwargs too: set it once.")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "quantization_config: bitsandbytes is not installed: pip install bitsandbytes, or leave it out."
        )
    if config.use_cpu or not torch.cuda.is_available():
        raise ValueError("quantization_config: weights of 4 and 8 bits need a CUDA device. Leave it out.")
    return {"quantization_config": quantization_config, "device_map": {"": config.device}}


BITSANDBYTES = ("Params4bit", "Int8Params")
"""Classes of parameters whose bits `plain_weight` can read."""


def is_quantized(weight: Any) -> bool:
    """Whether a parameter holds packed bits rather than numbers."""
    return isinstance(weight, Tensor) and (not weight.is_floating_point() or type(weight).__name__ in BITSANDBYTES)


def plain_weight(module: nn.Module) -> Tensor:
    """A linear layer's weight as numbers: the one it has, or the one that its bits stand for."""
    if not is_quantized(module.weight):
        assert isinstance(module.weight, Tensor)
        return module.weight
    numbers: Tensor = dequantize_module_weight(module)
    return numbers
