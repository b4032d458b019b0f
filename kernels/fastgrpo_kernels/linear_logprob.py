"""Log-probs of targets straight from hidden states and the LM head's weight, logits never handed out."""

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.backend import Backend, pick_backend
from fastgrpo_kernels.checks import check_linear_inputs
from fastgrpo_kernels.linear_logprob_gemm import (
    TileBuffers,
    gemm_config,
    launch_dhidden,
    launch_dweight,
    launch_logits,
    tile_buffers,
)
from fastgrpo_kernels.linear_logprob_operator import (
    Gradients,
    Kept,
    LinearOptions,
    RowStatistics,
    nothing_kept,
    register_linear_logprob,
)
from fastgrpo_kernels.linear_logprob_rows import launch_dlogits, launch_reduce, launch_targets
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
    byte_budget: int = 1 << 30,
    backend: Backend | None = None,
) -> LogprobOutput:
    """`logprob_from_logits(hidden[rows] @ weight.T, targets)` without ever holding [N, V].

    On CUDA the normaliser comes from the product's float32 accumulator. If [T, V] in hidden's dtype fits the budget,
    that much is kept for the backward pass (three products in all; a second backward pass through the same graph
    raises); otherwise it works through chunks of rows that fit, whose exponentials the backward pass makes again
    (four products). On CPU that much is kept only up to a few MB. Hidden rows whose targets all have zero gradient are
    left out of the backward pass. Under autocast, hidden is cast as `F.linear` casts it. Differentiable once.

    Args:
        hidden: [T, H] bfloat16, float16 or float32 (float64 on the torch backend).
        weight: [V, H], of hidden's dtype or float32; its gradient is summed in float32 and comes in its dtype.
        targets: [N] int64. `ignore_index` gives log-prob and entropy 0, without gradient.
        rows: [N] int64, the hidden row that target n reads, for targets that share one; None: n reads row n, N = T.
        temperature: divides the logits, in float32.
        entropy: whether to return the entropies too, in nats, with gradient.
        byte_budget: bytes of [rows, V] scratch. Beside it stand [rows, V / 256] statistics, weight's copy in hidden's
            dtype if the two differ and, for a half-precision weight and more than one chunk, a float32 [V, H].
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
    options = LinearOptions(float(temperature), entropy, ignore_index, byte_budget, keep=differentiable)
    if chosen == "torch":
        logprobs, entropies = cpu.linear_logprob(hidden, weight, targets, rows, options)
    else:
        keep = differentiable and len(hidden) <= _chunk_rows(hidden, len(weight), byte_budget)
        logprobs, entropies, *_ = _operator(hidden, weight, targets, rows, *options._replace(keep=keep))
    return LogprobOutput(logprobs, entropies if entropy else None)


def launch_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, options: LinearOptions
) -> tuple[Tensor, Tensor, RowStatistics, Kept]:
    """Per chunk of rows the product with its statistics, then one dot product a target."""
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    lse, row_entropy = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(2))
    temperature, entropy, ignore_index, byte_budget, keep = options
    logprobs, entropies = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    read = _rows_where(targets != ignore_index, rows, len(hidden))
    kept = nothing_kept(hidden)
    for chunk in _chunks(len(hidden), len(hidden) if keep else _chunk_rows(hidden, len(weight), byte_budget)):
        order, count = _partition(read[chunk])
        buffers = tile_buffers(hidden[chunk], len(weight), entropy, keep)
        launch_logits(hidden[chunk], weight, order, count, buffers, temperature)
        launch_reduce(order, count, buffers, lse[chunk], row_entropy[chunk])
        if buffers.exponentials is not None:
            kept = buffers.exponentials, buffers.maximum
    if len(targets):
        statistics = (lse, row_entropy, logprobs, entropies)
        launch_targets(hidden, weight, targets.contiguous(), rows.contiguous(), *statistics, temperature, ignore_index)
    return logprobs, entropies, RowStatistics(lse, row_entropy), kept


def launch_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    statistics: RowStatistics,
    kept: Kept | None,
    options: LinearOptions,
    need_hidden: bool,
    need_weight: bool,
) -> Gradients:
    """What was kept becomes the gradient of the logits; else a chunk is made again."""
    temperature, entropy, ignore_index, byte_budget, _ = options
    x, w = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    safe = rows.clamp(0, max(0, len(x) - 1))
    exists = (rows == safe) & (targets >= 0) & (targets < len(w))
    alive = statistics.lse[safe] != -float("inf") if len(x) else exists
    counted = exists & alive & (targets != ignore_index)
    grads = [g.masked_fill(~counted, 0.0) for g in (grad_logprobs, grad_entropy)]
    moved = _rows_where((grads[0] != 0) | (grads[1] != 0), rows, len(x))
    by_row = rows.argsort(stable=True)
    begins = torch.searchsorted(rows[by_row], torch.arange(len(x) + 1, device=x.device))
    readers = (targets[by_row], grads[0][by_row], grads[1][by_row], begins)

    chunks = _chunks(len(x), len(x) if kept else _chunk_rows(x, len(w), byte_budget))
    dhidden = torch.zeros_like(x) if need_hidden else None
    # Chunks add up in float32.
    sum_dtype = weight.dtype if len(chunks) == 1 else torch.float32
    dweight = torch.empty_like(w, dtype=sum_dtype) if need_weight else None
    if dweight is not None and not chunks:
        dweight.zero_()
    if kept is None:
        buffers = tile_buffers(x[chunks[0]] if chunks else x, len(w), False, True)
    else:
        exponentials, maximum = kept
        buffers = TileBuffers(maximum, maximum, None, exponentials)
    for chunk in chunks:
        part, lse, row_entropy = x[chunk], statistics.lse[chunk], statistics.entropy[chunk]
        order, count = _partition(moved[chunk])
        tiles = TileBuffers(*(None if b is None else b[: len(part)] for b in buffers))  # type: ignore[arg-type]
        assert tiles.exponentials is not None
        if kept is None:
            launch_logits(part, w, order, count, tiles, temperature)
        launch_dlogits(order, count, tiles, lse, row_entropy, readers, chunk.start, temperature, entropy, x.dtype)
        if dhidden is not None:
            launch_dhidden(tiles.exponentials, w, order, count, dhidden[chunk])
        if dweight is not None:
            launch_dweight(tiles.exponentials, part, order, count, dweight, accumulate=chunk.start > 0)
    return dhidden, None if dweight is None else dweight.to(weight.dtype)


def _room(hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions) -> Kept:
    """Exponentials of all rows and their tiles' maxima, as `TileBuffers` has them."""
    buffers = tile_buffers(hidden, len(weight), options.entropy, True)
    assert buffers.exponentials is not None
    return buffers.exponentials, buffers.maximum


_operator = register_linear_logprob("linear_logprob", launch_forward, launch_backward, _room)


def _rows_where(mask: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count] bool: whether any target [N] in the mask reads the row; rows outside are nobody's."""
    inside = (rows >= 0) & (rows < count)
    marks = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    return marks.index_add_(0, torch.where(inside, rows, count), mask.int())[:count] > 0


def _partition(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [R] int64 with those in the mask first, in order, and how many those are: [1] int64, on the device."""
    return (~mask).int().argsort(stable=True), mask.sum(dim=0, keepdim=True)


def _chunk_rows(hidden: Tensor, vocabulary: int, byte_budget: int) -> int:
    """Rows of exponentials that fit the budget; one at least."""
    config = gemm_config(hidden.dtype)
    fitting = byte_budget // (triton.cdiv(vocabulary, config.block_n) * config.block_n * hidden.element_size())
    # Whole tiles; and slices of the rows' statistics stay aligned, as the kernels were compiled for.
    return max(1, fitting // config.block_m * config.block_m or fitting)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Forward and backward at shipped shapes, on meta tensors, to be called inside `tl_utils.compile_only`."""
    shapes = [(width, torch.bfloat16) for width in (1536, 2048, 3584)] + [(1536, torch.float16), (1536, torch.float32)]
    for width, dtype in shapes:
        for keep in (True, False):
            for entropy in (False, True):
                mode = "keep" if keep else "recompute"
                label = f"linear_logprob H={width} {dtype} {mode} entropy={entropy}".replace("torch.", "")
                yield label, _aot_case(width, dtype, keep, entropy)


def _aot_case(width: int, dtype: torch.dtype, keep: bool, entropy: bool) -> Callable[[], None]:
    def run() -> None:
        tokens, vocabulary = 16_384, 151_936
        hidden, weight = (torch.empty(n, width, dtype=dtype, device="meta") for n in (tokens, vocabulary))
        targets, rows = (torch.empty(tokens, dtype=torch.int64, device="meta") for _ in range(2))
        gradient = torch.empty(tokens, dtype=torch.float32, device="meta")
        # Two chunks where they are made again, so that the second adds to the first's weight gradient.
        byte_budget = tokens // 2 * (vocabulary + 256) * dtype.itemsize
        options = LinearOptions(1.0, entropy, -100, byte_budget, keep)
        *_, statistics, kept = launch_forward(hidden, weight, targets, rows, options)
        inputs = (gradient, gradient, hidden, weight, targets, rows, statistics)
        launch_backward(*inputs, kept if keep else None, options, True, True)

    return run
