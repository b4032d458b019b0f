"""Replaces norms, activations and MLPs of transformers' models by one kernel each, within a context.

Modules are chosen by class, in tables. Classes in no table stay as they are; so do modules whose instance already has
its own `forward`.

Under bfloat16 autocast the norms take and return bfloat16 and compute statistics in float32. In fully fused layers the
residual stream is then bfloat16, as in the sampler. Under fp16 it stays float32, since it might overflow.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from fastgrpo_kernels import layer_norm, quick_gelu, rms_norm, swiglu
from torch import Tensor, nn

from fastgrpo.model.replaced_forward import replaced_forward

logger = logging.getLogger(__name__)

RMS_NORMS = (
    "Qwen2RMSNorm",
    "Qwen2VLRMSNorm",
    "Qwen2_5_VLRMSNorm",
    "Qwen3RMSNorm",
    "Qwen3MoeRMSNorm",
    "Qwen3VLTextRMSNorm",
    "Qwen3VLMoeTextRMSNorm",
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "Phi3RMSNorm",
    "SmolLM3RMSNorm",
)
"""weight · x / √(mean x² + variance_epsilon)."""

ONE_PLUS_NORMS = (
    "GemmaRMSNorm",
    "Gemma2RMSNorm",
    "Gemma3RMSNorm",
    "Qwen3NextRMSNorm",
    "Qwen3_5RMSNorm",
    "Qwen3_5MoeRMSNorm",
)
"""(1 + weight) · x / √(mean x² + eps)."""

GATED_MLPS = (
    "Qwen2MLP",
    "Qwen2_5_VLMLP",
    "Qwen3MLP",
    "Qwen3MoeMLP",
    "Qwen3VLTextMLP",
    "Qwen3VLMoeTextMLP",
    "Qwen3NextMLP",
    "Qwen3_5MLP",
    "Qwen3_5MoeMLP",
    "LlamaMLP",
    "MistralMLP",
    "SmolLM3MLP",
)
"""down_proj(act_fn(gate_proj(x)) · up_proj(x))."""

SILUS = ("SiLU", "SiLUActivation")
QUICK_GELUS = ("QuickGELUActivation",)


def class_of(module: Any) -> str:
    """The name of its class if defined by transformers or torch, else "": the name alone would not be enough."""
    kind = type(module)
    return kind.__name__ if kind.__module__.split(".")[0] in ("transformers", "torch") else ""


def stream_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype of the residual stream: bfloat16 under bfloat16 autocast, else `dtype`."""
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.bfloat16 if is_on and torch.get_autocast_dtype(device_type) == torch.bfloat16 else dtype


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turns autocast off, for operations that compute in the dtype of their inputs."""
    is_there = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if is_there else nullcontext()


def is_known(module: Any, classes: Sequence[str]) -> bool:
    """Whether it is of one of these classes and its `forward` is not replaced."""
    return class_of(module) in classes and "forward" not in vars(module)


def is_norm(module: Any) -> bool:
    """Whether it is a norm that `fused_modules` replaces."""
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return module.weight is not None and module.bias is not None and "forward" not in vars(module)
    return is_known(module, RMS_NORMS + ONE_PLUS_NORMS)


@contextmanager
def fused_modules(*roots: Any) -> Iterator[None]:
    """Within this context, known modules below these roots run fused kernels; None is skipped.

    `__call__` stays, so hooks run as before. A norm also accepts a residual (or None) as its second argument; it then
    returns (y, input + residual).
    """
    modules = {module for root in roots if root is not None for module in root.modules()}
    fused = [(module, forward) for module in modules if (forward := _fused_forward(module)) is not None]
    with ExitStack() as stack:
        for module, forward in fused:
            stack.enter_context(replaced_forward(module, forward))
        log_fused([module for module, _ in fused])
        yield


def log_fused(modules: Sequence[Any]) -> None:
    """Logs their classes, once per combination."""
    if modules:
        _log(tuple(sorted({type(module).__name__ for module in modules})))


@functools.cache
def _log(names: tuple[str, ...]) -> None:
    logger.info("fused kernels in %s", ", ".join(names))


def _fused_forward(module: Any) -> Callable[..., Any] | None:
    if is_norm(module):
        if type(module) is nn.LayerNorm:
            return partial(_layer_norm, module)
        return partial(_rms_norm if class_of(module) in RMS_NORMS else _one_plus_norm, module)
    if is_known(module, GATED_MLPS) and class_of(module.act_fn) in SILUS:
        return partial(_gated_mlp, module)
    return quick_gelu if is_known(module, QUICK_GELUS) else None


NO_RESIDUAL = object()


def _rms_norm(norm: Any, x: Tensor, residual: Any = NO_RESIDUAL) -> Any:
    return _normed(lambda x, residual: rms_norm(x, norm.weight, norm.variance_epsilon, residual), x, residual)


def _one_plus_norm(norm: Any, x: Tensor, residual: Any = NO_RESIDUAL) -> Any:
    weight = 1.0 + norm.weight.float()
    return _normed(lambda x, residual: rms_norm(x, weight, norm.eps, residual), x, residual)


def _layer_norm(norm: nn.LayerNorm, x: Tensor, residual: Any = NO_RESIDUAL) -> Any:
    return _normed(lambda x, residual: layer_norm(x, norm.weight, norm.bias, norm.eps, residual), x, residual)


def _normed(norm: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Any) -> Any:
    """y, or (y, x + residual) if a residual argument was passed, even None."""
    given = isinstance(residual, Tensor)
    wider = torch.promote_types(x.dtype, residual.dtype) if given and residual.dtype != x.dtype else x.dtype
    dtype = stream_dtype(wider, x.device.type)
    found = norm(x.to(dtype), residual.to(dtype) if given else None)
    return found[0] if residual is NO_RESIDUAL else found


def _gated_mlp(mlp: Any, x: Tensor) -> Any:
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
