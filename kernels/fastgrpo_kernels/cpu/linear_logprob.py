"""Log-probs of targets straight from hidden states, through cache-sized tiles of the vocabulary."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.linear_logprob_operator import (
    Gradients,
    Kept,
    LinearOptions,
    RowStatistics,
    nothing_kept,
    register_linear_logprob,
)

_TILE_BYTES = 2 << 20
"""Bytes of one tile of logits [T, columns]: small enough to stay in a CPU's caches between products."""
_MIN_COLUMNS = 256
"""Minimum columns of a tile, since narrower products are slow; only the byte budget goes below."""
_TILE_COPIES = 4
"""Most tile-sized buffers alive at once."""
_KEPT_BYTES = 16 << 20
"""Most bytes of exponentials kept for the backward pass instead of being recomputed."""


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, options: LinearOptions
) -> tuple[Tensor, Tensor]:
    """`fastgrpo_kernels.linear_logprob`: log-probs and entropies [N], the latter 0 unless asked.

    Works through tiles of vocabulary columns and recomputes each tile's logits in the backward pass, unless they are
    few. A row's logits are computed once per pass, however many targets read it. Rows that no target reads are skipped,
    as are rows without gradient in the backward pass. Products use hidden's dtype, all else float32.
    """
    keep = options.keep and fits(hidden, targets, len(weight), options.byte_budget)
    logprobs, entropies, *_ = _operator(hidden, weight, targets, rows, *options._replace(keep=keep))
    return logprobs, entropies


def fits(hidden: Tensor, targets: Tensor, vocabulary: int, byte_budget: int) -> bool:
    """Whether the exponentials of all logits are few enough to be kept."""
    size = min(len(hidden), len(targets)) * vocabulary * computing_dtype(hidden).itemsize
    return 0 < size <= min(_KEPT_BYTES, byte_budget // _TILE_COPIES)


def _room(hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearOptions) -> Kept:
    """[R, V]: exp(logits / temperature − top) of the rows that some target reads, in order, and their tops [R].

    R is the smaller of T and N; rows after the last one that is read are not set.
    """
    rows, dtype = min(len(hidden), len(targets)), computing_dtype(hidden)
    return hidden.new_empty(rows, len(weight), dtype=dtype), hidden.new_empty(rows, dtype=dtype)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, options: LinearOptions
) -> tuple[Tensor, Tensor, RowStatistics, Kept]:
    """With lse_b and H_b the log-sum-exp and entropy of the softmax over tile b alone: lse = log Σ exp(lse_b), and by
    the chain rule entropy = Σ exp(lse_b − lse) · (H_b + lse − lse_b), whose terms are all ≥ 0.
    """
    kept = _room(hidden, weight, targets, options) if options.keep else None
    counted = (targets != options.ignore_index).nonzero().squeeze(1)
    used, local = rows[counted].unique(return_inverse=True)
    target_logits = hidden.new_zeros(len(counted), dtype=computing_dtype(hidden))
    tile_lse, tile_entropy = [], []
    for start, block, logits in _tiles(hidden[used], weight, options, whole=kept is not None):
        here = _within(targets[counted], start, len(block))
        target_logits[here] = logits[local[here], targets[counted[here]] - start]
        lse, within_tile = _softmax_statistics(logits, options.entropy, kept)
        tile_lse.append(lse)
        tile_entropy.append(within_tile)
    by_tile = torch.stack(tile_lse)  # [tiles, used rows]
    lse = torch.logsumexp(by_tile, dim=0)
    share = (by_tile - lse).exp().nan_to_num(0.0) if options.entropy else torch.zeros_like(by_tile)
    surprise = (lse - by_tile).masked_fill(share == 0, 0.0)
    statistics = RowStatistics(*(lse.new_zeros(len(hidden)) for _ in range(2)))
    statistics.lse[used] = lse
    statistics.entropy[used] = (share * (torch.stack(tile_entropy) + surprise)).sum(dim=0)

    logprobs, entropies = (lse.new_zeros(len(targets)) for _ in range(2))
    dead = lse[local] == -math.inf
    logprobs[counted] = (target_logits - lse[local]).masked_fill(dead, -math.inf)
    entropies[counted] = statistics.entropy[used][local]
    return logprobs, entropies, statistics, kept or nothing_kept(hidden)


def _backward(
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
    """With p the row's softmax, G and E the sums of both gradients over the targets n that read the row:
    dlogits = (Σₙ gₙ · onehot(targetₙ) − p · (G + E · (log p + entropy))) / temperature.
    """
    counted = (targets != options.ignore_index) & (statistics.lse[rows] != -math.inf)
    moved = (counted & ((grad_logprobs != 0) | (grad_entropy != 0))).nonzero().squeeze(1)
    used, local = rows[moved].unique(return_inverse=True)
    x, lse = hidden[used], statistics.lse[used]
    upstream = grad_logprobs[moved]
    by_row, entropy_by_row = (
        lse.new_zeros(len(used)).index_add_(0, local, g[moved]) for g in (grad_logprobs, grad_entropy)
    )
    constant = by_row + entropy_by_row * statistics.entropy[used]
    entropy = options.entropy and bool(entropy_by_row.any())  # asked for as a metric alone: no gradient

    if kept is not None and not entropy:
        read = rows[targets != options.ignore_index].unique()  # as in the forward pass
        exponentials, top = (part[: len(read)] for part in kept)
        if len(used) < len(read):
            place = torch.searchsorted(read, used)
            exponentials, top = exponentials[place], top[place]
        scaled = exponentials.mul_((-constant * (top - lse).exp())[:, None])  # −p · constant
        tiles = iter([(0, weight.to(x.dtype), scaled)])
    else:
        tiles = _softmax_gradients(x, weight, options, lse, constant, entropy_by_row if entropy else None)
    grad_x = torch.zeros_like(x, dtype=lse.dtype)
    grad_weight = torch.empty_like(weight) if need_weight else None
    for start, block, dlogits in tiles:
        here = _within(targets[moved], start, len(block))
        dlogits.index_put_((local[here], targets[moved[here]] - start), upstream[here], accumulate=True)
        dlogits = dlogits.to(x.dtype)
        if need_hidden:
            grad_x += dlogits @ block
        if grad_weight is not None:
            grad_weight[start : start + len(block)] = (dlogits.T @ x).div_(options.temperature)
    grad_hidden = torch.zeros_like(hidden)
    grad_hidden[used] = (grad_x / options.temperature).to(hidden.dtype)
    return grad_hidden if need_hidden else None, grad_weight


def _softmax_gradients(
    x: Tensor,
    weight: Tensor,
    options: LinearOptions,
    lse: Tensor,
    constant: Tensor,
    entropy_by_row: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Like `_tiles`, with −p · (constant + E · log p) instead of the logits."""
    for start, block, logits in _tiles(x, weight, options):
        logp = logits.sub_(lse[:, None])
        if entropy_by_row is None:
            yield start, block, logp.exp_().mul_(-constant[:, None])
        else:
            # exp(−1e4) is 0 in every dtype, and 0 · −1e4 is too, where 0 · −inf would be NaN.
            factor = logp.clamp_(min=-1e4) * entropy_by_row[:, None]
            yield start, block, logp.exp_().mul_(factor.add_(constant[:, None])).neg_()


def _tiles(
    x: Tensor, weight: Tensor, options: LinearOptions, *, whole: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields each tile's first column, its rows of weight [C, H] in x's dtype, and its logits [R, C] / temperature.

    All tiles' logits share one buffer. `whole`: one tile for all columns.
    """
    dtype = computing_dtype(x)
    column_bytes = max(1, len(x)) * dtype.itemsize
    columns = max(_MIN_COLUMNS, _TILE_BYTES // column_bytes)
    columns = max(1, min(columns, options.byte_budget // (_TILE_COPIES * column_bytes), len(weight)))
    columns = len(weight) if whole else columns
    product, converted = (x.new_empty(len(x) * columns, dtype=d) for d in (x.dtype, dtype))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(weight), columns):
            block = weight[start : start + columns].to(x.dtype)
            shape = (len(x), len(block))
            logits = torch.mm(x, block.T, out=product[: math.prod(shape)].view(shape))
            if dtype != x.dtype:
                logits = converted[: math.prod(shape)].view(shape).copy_(logits)
            yield start, block, logits if options.temperature == 1 else logits.div_(options.temperature)


def _within(targets: Tensor, start: int, count: int) -> Tensor:
    """Indices of the targets in start..start+count−1."""
    return ((targets >= start) & (targets < start + count)).nonzero().squeeze(1)


def _softmax_statistics(logits: Tensor, entropy: bool, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy (0 unless asked) of logits [R, C], row by row; overwrites the logits, fills `kept`."""
    top = logits.amax(dim=1)
    shift = top.masked_fill(top == -math.inf, 0.0)  # −inf − −inf is NaN
    shifted = logits.sub_(shift[:, None])
    if kept is not None:
        exponentials, top_kept = (part[: len(shift)] for part in kept)
        top_kept.copy_(shift)
        torch.exp(shifted, out=exponentials)
    else:
        exponentials = shifted.exp() if entropy else shifted.exp_()
    total = exponentials.sum(dim=1)
    if not entropy:
        return shift + total.log(), torch.zeros_like(total)
    mean = torch.linalg.vecdot(exponentials, shifted.clamp_(min=-1e4)) / total
    return shift + total.log(), (total.log() - mean).masked_fill(total == 0, 0.0)


_operator = register_linear_logprob("linear_logprob_cpu", _forward, _backward, _room)
