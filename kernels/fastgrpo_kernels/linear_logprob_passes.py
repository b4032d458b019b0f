"""Forward and backward of `linear_logprob` on a GPU: selects rows and launches the kernels.

Hidden rows that some target reads are gathered first. Buffers hold R rows, the smaller of T and N, so no count has to
be read back to size them.
"""

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fastgrpo_kernels.linear_logprob_gemm import TileBuffers, launch_logits, logits_tile, multiply, tile_buffers, ways
from fastgrpo_kernels.linear_logprob_operator import Gradients, Kept, LinearOptions, RowStatistics, nothing_kept
from fastgrpo_kernels.linear_logprob_pick import pick_way
from fastgrpo_kernels.linear_logprob_rows import launch_dlogits, launch_reduce, launch_targets


def fits(hidden: Tensor, targets: Tensor, vocabulary: int, byte_budget: int) -> bool:
    """Whether the exponentials of all rows fit the budget."""
    rows = min(len(hidden), len(targets))
    return len(_chunks(rows, vocabulary, hidden.dtype, byte_budget)) <= 1


def room(hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions) -> Kept:
    """What is kept, uninitialised: exponentials of R rows and their tiles' maxima, as `TileBuffers` has them."""
    return _kept(tile_buffers(hidden, min(len(hidden), len(targets)), len(weight), options.entropy, keep=True))


def launch_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, options: LinearOptions
) -> tuple[Tensor, Tensor, RowStatistics, Kept]:
    """The product of all rows with its statistics, then one dot product per target."""
    temperature, entropy, ignore_index, _, keep = options
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    lse, row_entropy = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(2))
    logprobs, entropies = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    order, count = _partition(_rows_where(targets != ignore_index, rows, len(hidden)), len(targets))
    buffers = tile_buffers(hidden, len(order), len(weight), entropy, keep)
    _launch_logits(hidden[order], weight, count, buffers, temperature)
    launch_reduce(order, count, buffers, lse, row_entropy)
    if len(targets):
        statistics = (lse, row_entropy, logprobs, entropies)
        launch_targets(hidden, weight, targets.contiguous(), rows.contiguous(), *statistics, temperature, ignore_index)
    kept = _kept(buffers) if keep else nothing_kept(hidden)
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
    """Turns kept exponentials into the gradient of the logits, or recomputes them.

    Recomputes by chunks of the vocabulary, as wide as the budget allows. A chunk's rows of weight's gradient are
    written once, in its dtype; the gradient of the hidden states is accumulated in float32.
    """
    temperature, entropy, ignore_index, byte_budget, _ = options
    hidden, w = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    safe = rows.clamp(0, max(0, len(hidden) - 1))
    exists = (rows == safe) & (targets >= 0) & (targets < len(w))
    alive = statistics.lse[safe] != -float("inf") if len(hidden) else exists
    counted = targets != ignore_index
    grads = [g.masked_fill(~(counted & exists & alive), 0.0) for g in (grad_logprobs, grad_entropy)]
    moved = _rows_where((grads[0] != 0) | (grads[1] != 0), rows, len(hidden))
    by_row = rows.argsort(stable=True)
    begins = torch.searchsorted(rows[by_row], torch.arange(len(hidden) + 1, device=rows.device))
    readers = (targets[by_row], grads[0][by_row], grads[1][by_row], begins)

    # Kept exponentials are in the forward pass's row order.
    order, count = _partition(_rows_where(counted, rows, len(hidden)) if kept else moved, len(targets))
    if len(order) == 0:
        return (torch.zeros_like(hidden) if need_hidden else None), (torch.zeros_like(weight) if need_weight else None)
    live = moved[order]
    idle = ~live[:, None]
    x = hidden[order].masked_fill_(idle, 0.0)  # 0 · NaN would reach the sums
    dweight = torch.empty_like(w, dtype=weight.dtype) if need_weight else None
    dx = None
    for chunk in _chunks(len(x), len(w), x.dtype, None if kept else byte_budget):
        part = w[chunk]
        exponentials, maximum = kept or _made_again(x, part, count, temperature)
        inputs = (exponentials, maximum, statistics.lse, statistics.entropy, readers)
        launch_dlogits(order, live, *inputs, chunk.start, temperature, entropy)
        dlogits = exponentials[:, : len(part)]
        if need_hidden:
            share = multiply(dlogits, part, x.new_empty(x.shape, dtype=torch.float32))
            dx = share if dx is None else dx.add_(share)
        if dweight is not None:
            multiply(dlogits.T, x, dweight[chunk])
    if dx is None:
        return None, dweight
    # An idle row's products may be NaN: 0 · −inf.
    dx = dx.masked_fill_(idle, 0.0).to(hidden.dtype)
    return torch.zeros_like(hidden).index_copy_(0, order, dx), dweight


def _made_again(x: Tensor, weight: Tensor, count: Tensor, temperature: float) -> Kept:
    """A chunk's exponentials; the previous chunk's are freed by then, so their memory is reused."""
    buffers = tile_buffers(x, len(x), len(weight), entropy=False, keep=True)
    _launch_logits(x, weight, count, buffers, temperature)
    return _kept(buffers)


def _kept(buffers: TileBuffers) -> Kept:
    assert buffers.exponentials is not None
    return buffers.exponentials, buffers.maximum


def _launch_logits(x: Tensor, weight: Tensor, count: Tensor, buffers: TileBuffers, temperature: float) -> None:
    """Launches the way that is fastest here."""
    way = ways(x, weight)[pick_way(x, weight, count, buffers)]
    launch_logits(x, weight, count, buffers, temperature, way)


def _rows_where(mask: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count] bool: whether any target [N] in the mask reads the row; `rows` out of range are ignored."""
    inside = (rows >= 0) & (rows < count)
    marks = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    return marks.index_add_(0, torch.where(inside, rows, count), mask.int())[:count] > 0


def _partition(mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first `most` indices (int64) of the mask [T], with masked-in ones first, in order; and how many are masked
    in, which `most` must cover: [1] int64, on the device."""
    return (~mask).int().argsort(stable=True)[:most], mask.sum(dim=0, keepdim=True)


def _chunks(rows: int, vocabulary: int, dtype: torch.dtype, byte_budget: int | None) -> list[slice]:
    """Chunks of the vocabulary, each of equally many whole tiles: as few chunks as fit the budget; None: one."""
    columns = logits_tile(dtype).columns
    tiles = triton.cdiv(vocabulary, columns)
    fitting = tiles if byte_budget is None else byte_budget // (max(1, rows) * columns * dtype.itemsize)
    size = triton.cdiv(tiles, triton.cdiv(tiles, max(1, fitting))) * columns if tiles else 1
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


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
        # Two chunks where they are made again.
        options = LinearOptions(1.0, entropy, -100, tokens // 2 * (vocabulary + 256) * dtype.itemsize, keep)
        *_, statistics, kept = launch_forward(hidden, weight, targets, rows, options)
        count = torch.empty(1, dtype=torch.int64, device="meta")
        for way in ways(hidden, weight).values():
            launch_logits(hidden, weight, count, tile_buffers(hidden, tokens, vocabulary, entropy, keep), 1.0, way)
        inputs = (gradient, gradient, hidden, weight, targets, rows, statistics)
        launch_backward(*inputs, kept if keep else None, options, True, True)

    return run
