"""Input checks of the ops, shared by their implementations."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastgrpo_kernels.types import LossParams, check_option


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half precision, the tensor's own for float32 and float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def shape_of(tensor: Tensor) -> list[int]:
    """The shape, for messages."""
    return list(tensor.shape)


def check_temperature(temperature: float) -> None:
    """Raises a ValueError unless finite and positive."""
    check_option("temperature", temperature, 0 < temperature < math.inf, "a finite number above 0")


def check_range(name: str, indices: Tensor, size: int, ignore_index: int | None = None) -> None:
    """Raises a ValueError that names the first index outside 0..size−1; on CPU only, since it reads values."""
    if indices.device.type != "cpu":
        return
    wrong = (indices < 0) | (indices >= size)
    if ignore_index is not None:
        wrong &= indices != ignore_index
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{position}]={int(indices[position])} is outside 0..{size - 1}.")


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    """Raises a ValueError unless both are contiguous and of one shape [pages, page_size, Hkv, D]."""
    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape:
        raise ValueError(
            f"key_cache {shape_of(key_cache)}, value_cache {shape_of(value_cache)} do not fit: "
            "pass twice [pages, page_size, Hkv, D]."
        )
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("key_cache and value_cache must be contiguous: allocate one tensor per layer, or layer first.")


def check_logits(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> None:
    """Raises the ValueErrors of `logprob_from_logits`."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {shape_of(logits)}, targets {shape_of(targets)} do not fit: pass [N, V] and [N].")
    check_temperature(temperature)
    check_range("targets", targets, logits.shape[1], ignore_index)


def check_linear_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Raises the ValueErrors that need no values; returns hidden as autocast casts it, and `rows` as a tensor."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {shape_of(hidden)}, weight {shape_of(weight)} do not fit: pass [T, H] and [V, H].")
    if targets.ndim != 1 or targets.shape != (hidden.shape[:1] if rows is None else rows.shape):
        reason = f"one per row of hidden {shape_of(hidden)}, or pass rows" if rows is None else "one per entry of rows"
        raise ValueError(f"targets {shape_of(targets)} do not fit: pass {reason}.")
    if rows is None:
        rows = torch.arange(len(targets), device=targets.device)
    for name, tensor in (("weight", weight), ("targets", targets), ("rows", rows)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: move them to one device.")
        if name != "weight" and tensor.dtype != torch.int64:
            raise ValueError(f"{name} is {tensor.dtype}: pass torch.int64.")
    check_temperature(temperature)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}: pass one dtype, or a float32 weight.")
    return hidden, rows


def check_linear_values(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, ignore_index: int) -> None:
    """Raises those that read values; separate, since torch.compile cannot trace them."""
    check_range("rows", rows, hidden.shape[0])
    check_range("targets", targets, weight.shape[0], ignore_index)


def check_loss_inputs(logprobs: Tensor, params: LossParams, arguments: Mapping[str, Tensor | None]) -> None:
    """Raises the ValueError of an argument whose shape, dtype or device does not fit, or that is missing.

    Values of cu_seqlens are checked on CPU only, since reading waits for the device, and not under torch.compile.
    """
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs has shape {shape_of(logprobs)}: pass [T], the tokens of all sequences in a row.")
    for name, value in {"logprobs": logprobs, **arguments}.items():
        if value is not None:
            _check_argument(name, value, logprobs)
    advantages, cu_seqlens = arguments["advantages"], arguments["cu_seqlens"]
    assert advantages is not None
    assert cu_seqlens is not None
    sequences = len(advantages)
    if cu_seqlens.shape != (sequences + 1,):
        raise ValueError(f"cu_seqlens has shape {shape_of(cu_seqlens)}: pass {sequences} + 1, as there are advantages.")
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens starts at {int(cu_seqlens[0])}: start it at 0.")
    if readable and int(cu_seqlens[-1]) != len(logprobs):
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {len(logprobs)} logprobs.")
    if params.beta != 0 and arguments["ref_logprobs"] is None:
        raise ValueError(f"beta={params.beta} needs ref_logprobs: pass them, or set beta to 0.")
    if arguments["entropy_weights"] is not None and arguments["entropy"] is None:
        raise ValueError("entropy_weights needs entropy: pass it, or leave entropy_weights out.")


def _check_argument(name: str, value: Tensor, logprobs: Tensor) -> None:
    if value.device != logprobs.device:
        raise ValueError(f"{name} is on {value.device}, logprobs on {logprobs.device}: move it there.")
    if name == "mask":
        valid, wanted = value.dtype == torch.bool, "torch.bool"
    elif name == "cu_seqlens":
        valid, wanted = value.dtype in (torch.int32, torch.int64), "torch.int64"
    else:
        valid, wanted = value.is_floating_point(), "floating-point numbers"
    if not valid:
        raise ValueError(f"{name} holds {value.dtype}: pass {wanted}.")
    if name == "advantages" and value.dim() != 1:
        raise ValueError(f"advantages has shape {shape_of(value)}: pass [N], one a sequence.")
    if name not in ("advantages", "cu_seqlens") and value.shape != logprobs.shape:
        raise ValueError(f"{name} has shape {shape_of(value)}, logprobs {shape_of(logprobs)}: pass one value a token.")
