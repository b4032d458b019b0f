"""Log-probs of targets directly from hidden states and the LM head's weight, without storing all logits."""

import torch
from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.backend import Backend, pick_backend
from fastgrpo_kernels.checks import check_linear_inputs
from fastgrpo_kernels.linear_logprob_operator import LinearOptions, register_linear_logprob
from fastgrpo_kernels.linear_logprob_passes import fits, launch_backward, launch_forward, room
from fastgrpo_kernels.types import LogprobOutput


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    byte_budget: int | None = None,
    backend: Backend | None = None,
) -> LogprobOutput:
    """`logprob_from_logits(hidden[rows] @ weight.T, targets)` without ever holding [N, V].

    On CUDA the normaliser comes from the product's float32 accumulator. R is the smaller of T and N. If [R, V] in
    hidden's dtype fits the budget, exponentials of that size are kept for the backward pass (three products in all; a
    second backward pass through the same graph raises). Otherwise the backward pass recomputes them in chunks of the
    vocabulary that fit (four products). On CPU at most a few MB are kept. Under autocast, hidden is cast as `F.linear`
    casts it. Differentiable once.

    A product is 2·R·H·V operations: for 16,384 rows, H = 1536 and V = 151,936 three are 22.9 TFLOP, 29.6 ms at the
    776 TFLOP/s that an H100 reaches in large bfloat16 products. What is kept is 5 GB, written once forward; backward it
    is read and written once in place (3.4 ms at 2.97 TB/s), then read by each product.

    Args:
        hidden: [T, H] bfloat16, float16 or float32 (float64 on the torch backend).
        weight: [V, H], of hidden's dtype or float32; its gradient is summed in float32 and comes in its dtype.
        targets: [N] int64. `ignore_index` gives log-prob and entropy 0, without gradient.
        rows: [N] int64, the hidden row of each target, if targets share rows; None: target n reads row n, N = T.
        temperature: divides the logits, in float32.
        entropy: whether to return the entropies too, in nats, with gradient.
        byte_budget: bytes of [R, V] scratch, for the backward pass alone. Beside it stand two float32 [R, H], [R, V /
            256] statistics and, if the dtypes differ, weight's copy in hidden's. None: half of what the GPU has free,
            1 GiB on CPU (under torch.compile, as found when it compiles).
        backend: forces "torch" or "triton"; None: by device, or FASTGRPO_KERNELS.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a bad temperature; and, on CPU tensors only, targets
            outside 0..V−1 or rows outside 0..T−1. On CUDA tensors such a target's log-prob is
            NaN, and it has no gradient.
    """
    hidden, rows = check_linear_inputs(hidden, weight, targets, rows, temperature)
    chosen = pick_backend(hidden, backend)
    if chosen == "triton" and hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden is {hidden.dtype}: pass bfloat16, float16 or float32, or use backend torch.")
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if byte_budget is None:  # on a GPU a forward pass takes no scratch
        byte_budget = automatic_budget(hidden.device) if differentiable or chosen == "torch" else 0
    options = LinearOptions(float(temperature), entropy, ignore_index, byte_budget, keep=differentiable)
    if chosen == "torch":
        logprobs, entropies = cpu.linear_logprob(hidden, weight, targets, rows, options)
    else:
        keep = differentiable and fits(hidden, targets, len(weight), byte_budget)
        logprobs, entropies, *_ = _operator(hidden, weight, targets, rows, *options._replace(keep=keep))
    return LogprobOutput(logprobs, entropies if entropy else None)


_operator = register_linear_logprob("linear_logprob", launch_forward, launch_backward, room)


@torch.compiler.assume_constant_result
def automatic_budget(device: torch.device) -> int:
    """Half of a GPU's free bytes, including those that torch has reserved, at least 256 MiB; on CPU 1 GiB."""
    if device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1 << 28, (free + reserve) // 2)
