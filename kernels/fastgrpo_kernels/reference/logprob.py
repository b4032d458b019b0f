"""Log-probs of targets, from logits or from hidden states, in plain torch."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo_kernels.reference.checks import check_range, check_temperature, computing_dtype, shape_of
from fastgrpo_kernels.types import LogprobOutput

_TILE_BYTES = 2 << 20
"""Bytes of one tile of logits [T, columns]: small enough to stay in a CPU's caches from product to product."""
_MIN_COLUMNS = 256
"""Narrower tiles make slow products; only the byte budget takes them."""
_TILE_COPIES = 4
"""Tile-sized buffers alive at once, at most."""
_KEPT_BYTES = 16 << 20
"""Exponentials of the logits that are kept for the backward pass, rather than made again: at most so many bytes."""


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> LogprobOutput:
    """Log-probs of targets [N] int64 under logits [N, V] of any float dtype, in float32.

    A logit of −inf has probability 0 and adds 0 to the entropy. A row of −inf alone gives log-prob −inf and
    entropy 0, without gradient. A target equal to `ignore_index` gives 0 and 0, without gradient.

    Raises:
        ValueError: wrong shapes, temperature not positive, or (CPU only) a target outside 0..V−1. On a CUDA
            device such a target trips the device-side assertion of indexing.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {shape_of(logits)}, targets {shape_of(targets)} do not fit: pass [N, V] and [N].")
    check_temperature(temperature)
    check_range("targets", targets, logits.shape[1], ignore_index)
    ignored = targets == ignore_index
    scaled = logits.to(computing_dtype(logits)) / temperature
    # log_softmax of a row of −inf alone is NaN, forward and backward.
    dead = scaled.detach().amax(dim=-1) == -math.inf  # [N]
    logp = torch.log_softmax(scaled.masked_fill(dead[:, None], 0.0), dim=-1)
    logprobs = logp.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    logprobs = logprobs.masked_fill(dead, -math.inf).masked_fill(ignored, 0.0)
    if not entropy:
        return LogprobOutput(logprobs, None)
    # 0 · −inf counts as 0.
    entropies = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(dim=-1)
    return LogprobOutput(logprobs, entropies.masked_fill(ignored | dead, 0.0))


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
) -> LogprobOutput:
    """`logprob_from_logits(hidden[rows] @ weight.T, targets)` without ever holding [N, V].

    Works through tiles of vocabulary columns and recomputes each tile's logits in the backward pass. A row's
    logits are computed once per pass however many targets read it; rows that no target reads are left out, and
    in the backward pass rows without gradient. The products are taken in hidden's dtype, all else in float32.
    Under autocast, hidden is cast as `F.linear` casts it. Differentiable once.

    Args:
        hidden: [T, H].
        weight: [V, H]; computed in hidden's dtype, its gradient comes in its own.
        targets: [N] int64.
        rows: [N] int64, the hidden row that target n reads; None: target n reads row n, and N = T.
        byte_budget: bytes of scratch that tiles may take; one column is taken at least.

    Raises:
        ValueError: as `logprob_from_logits`; dtypes or devices that do not fit; `rows` missing where N ≠ T, or
            (CPU only) outside 0..T−1.
    """
    hidden, rows = check_linear_inputs(hidden, weight, targets, rows, temperature)
    check_linear_values(hidden, weight, targets, rows, ignore_index)
    logprobs, entropies = _LinearLogprob.apply(
        hidden, weight, targets, rows, temperature, entropy, ignore_index, byte_budget
    )
    return LogprobOutput(logprobs, entropies if entropy else None)


def check_linear_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Raises the ValueErrors that need no values; returns hidden as autocast wants it, and `rows` written out."""
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
    """Raises the others; apart, since torch.compile traces no check of values."""
    check_range("rows", rows, hidden.shape[0])
    check_range("targets", targets, weight.shape[0], ignore_index)


class RowStatistics(NamedTuple):
    """What the forward pass leaves for the backward pass, per hidden row, in the computing dtype."""

    lse: Tensor
    """[T]: log Σ exp(logits / temperature); 0 for rows that no target reads."""
    entropy: Tensor
    """[T]; 0 unless asked."""


class KeptTile(NamedTuple):
    """All logits of the forward pass as one tile, for the backward pass, which overwrites it."""

    exponentials: Tensor
    """[R, V]: exp(logits / temperature − top), of the rows that some target reads, in order; the rest is not set."""
    top: Tensor
    """[R]"""

    @classmethod
    def room(cls, hidden: Tensor, targets: Tensor, vocabulary: int) -> "KeptTile":
        """Uninitialised; R is the smaller of T and N."""
        rows, dtype = min(len(hidden), len(targets)), computing_dtype(hidden)
        return cls(hidden.new_empty(rows, vocabulary, dtype=dtype), hidden.new_empty(rows, dtype=dtype))

    @staticmethod
    def fits(hidden: Tensor, targets: Tensor, vocabulary: int, byte_budget: int) -> bool:
        """Whether it is small enough to be kept."""
        size = min(len(hidden), len(targets)) * vocabulary * computing_dtype(hidden).itemsize
        return 0 < size <= min(_KEPT_BYTES, byte_budget // _TILE_COPIES)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor,
        temperature: float,
        entropy: bool,
        ignore_index: int,
        byte_budget: int,
    ) -> tuple[Tensor, Tensor]:
        options = (temperature, entropy, ignore_index, byte_budget)
        output, statistics = linear_forward(hidden, weight, targets, rows, *options)
        ctx.save_for_backward(hidden, weight, targets, rows, *statistics)
        ctx.options = options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, rows, lse, row_entropy = ctx.saved_tensors
        gradients = linear_backward(
            grad_logprobs,
            grad_entropy,
            hidden,
            weight,
            targets,
            rows,
            RowStatistics(lse, row_entropy),
            *ctx.options,
            *ctx.needs_input_grad[:2],
        )
        return *gradients, *[None] * 6


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    temperature: float,
    entropy: bool,
    ignore_index: int,
    byte_budget: int,
    kept: KeptTile | None = None,
) -> tuple[tuple[Tensor, Tensor], RowStatistics]:
    """Log-probs and entropies [N], the latter 0 unless asked; fills `kept`.

    With lse_b and H_b the log-sum-exp and entropy of the softmax over tile b alone: lse = log Σ exp(lse_b), and by
    the chain rule entropy = Σ exp(lse_b − lse) · (H_b + lse − lse_b), whose terms are all ≥ 0.
    """
    counted = (targets != ignore_index).nonzero().squeeze(1)
    used, local = rows[counted].unique(return_inverse=True)
    target_logits = hidden.new_zeros(len(counted), dtype=computing_dtype(hidden))
    tile_lse, tile_entropy = [], []
    for start, block, logits in _tiles(hidden[used], weight, temperature, byte_budget, whole=kept is not None):
        here = _within(targets[counted], start, len(block))
        target_logits[here] = logits[local[here], targets[counted[here]] - start]
        lse, within_tile = _softmax_statistics(logits, entropy, kept)
        tile_lse.append(lse)
        tile_entropy.append(within_tile)
    by_tile = torch.stack(tile_lse)  # [tiles, used rows]
    lse = torch.logsumexp(by_tile, dim=0)
    share = (by_tile - lse).exp().nan_to_num(0.0) if entropy else torch.zeros_like(by_tile)
    surprise = (lse - by_tile).masked_fill(share == 0, 0.0)
    statistics = RowStatistics(*(lse.new_zeros(len(hidden)) for _ in range(2)))
    statistics.lse[used] = lse
    statistics.entropy[used] = (share * (torch.stack(tile_entropy) + surprise)).sum(dim=0)

    logprobs, entropies = (lse.new_zeros(len(targets)) for _ in range(2))
    dead = lse[local] == -math.inf
    logprobs[counted] = (target_logits - lse[local]).masked_fill(dead, -math.inf)
    entropies[counted] = statistics.entropy[used][local]
    return (logprobs, entropies), statistics


def linear_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    statistics: RowStatistics,
    temperature: float,
    entropy: bool,
    ignore_index: int,
    byte_budget: int,
    need_hidden: bool,
    need_weight: bool,
    kept: KeptTile | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, from those of log-probs and entropies [N]; overwrites `kept`.

    With p the row's softmax, G and E the sums of both gradients over the targets n that read the row:
    dlogits = (Σₙ gₙ · onehot(targetₙ) − p · (G + E · (log p + entropy))) / temperature.
    """
    counted = (targets != ignore_index) & (statistics.lse[rows] != -math.inf)
    moved = (counted & ((grad_logprobs != 0) | (grad_entropy != 0))).nonzero().squeeze(1)
    used, local = rows[moved].unique(return_inverse=True)
    x, lse = hidden[used], statistics.lse[used]
    upstream = grad_logprobs[moved]
    by_row, entropy_by_row = (
        lse.new_zeros(len(used)).index_add_(0, local, g[moved]) for g in (grad_logprobs, grad_entropy)
    )
    constant = by_row + entropy_by_row * statistics.entropy[used]
    entropy = entropy and bool(entropy_by_row.any())  # asked for as a metric alone: no gradient

    if kept is not None and not entropy:
        read = rows[targets != ignore_index].unique()  # as in the forward pass
        exponentials, top = (part[: len(read)] for part in kept)
        if len(used) < len(read):
            place = torch.searchsorted(read, used)
            exponentials, top = exponentials[place], top[place]
        scaled = exponentials.mul_((-constant * (top - lse).exp())[:, None])  # −p · constant
        tiles = iter([(0, weight.to(x.dtype), scaled)])
    else:
        tiles = _softmax_gradients(
            x, weight, temperature, byte_budget, lse, constant, entropy_by_row if entropy else None
        )
    grad_x = torch.zeros_like(x, dtype=lse.dtype)
    grad_weight = torch.empty_like(weight) if need_weight else None
    for start, block, dlogits in tiles:
        here = _within(targets[moved], start, len(block))
        dlogits.index_put_((local[here], targets[moved[here]] - start), upstream[here], accumulate=True)
        dlogits = dlogits.to(x.dtype)
        if need_hidden:
            grad_x += dlogits @ block
        if grad_weight is not None:
            grad_weight[start : start + len(block)] = (dlogits.T @ x).div_(temperature)
    grad_hidden = torch.zeros_like(hidden)
    grad_hidden[used] = (grad_x / temperature).to(hidden.dtype)
    return grad_hidden if need_hidden else None, grad_weight


def _softmax_gradients(
    x: Tensor,
    weight: Tensor,
    temperature: float,
    byte_budget: int,
    lse: Tensor,
    constant: Tensor,
    entropy_by_row: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Like `_tiles`, with −p · (constant + E · log p) in the place of the logits."""
    for start, block, logits in _tiles(x, weight, temperature, byte_budget):
        logp = logits.sub_(lse[:, None])
        if entropy_by_row is None:
            yield start, block, logp.exp_().mul_(-constant[:, None])
        else:
            # exp(−1e4) is 0 in every dtype, and 0 · −1e4 is too, where 0 · −inf would be NaN.
            factor = logp.clamp_(min=-1e4) * entropy_by_row[:, None]
            yield start, block, logp.exp_().mul_(factor.add_(constant[:, None])).neg_()


def _tiles(
    x: Tensor, weight: Tensor, temperature: float, byte_budget: int, *, whole: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields each tile's first column, its rows of weight [C, H] in x's dtype, and its logits [R, C] / temperature.

    All tiles' logits share one buffer. `whole`: one tile for all columns.
    """
    dtype = computing_dtype(x)
    column_bytes = max(1, len(x)) * dtype.itemsize
    columns = max(_MIN_COLUMNS, _TILE_BYTES // column_bytes)
    columns = max(1, min(columns, byte_budget // (_TILE_COPIES * column_bytes), len(weight)))
    columns = len(weight) if whole else columns
    product, converted = (x.new_empty(len(x) * columns, dtype=d) for d in (x.dtype, dtype))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(weight), columns):
            block = weight[start : start + columns].to(x.dtype)
            shape = (len(x), len(block))
            logits = torch.mm(x, block.T, out=product[: math.prod(shape)].view(shape))
            if dtype != x.dtype:
                logits = converted[: math.prod(shape)].view(shape).copy_(logits)
            yield start, block, logits if temperature == 1 else logits.div_(temperature)


def _within(targets: Tensor, start: int, count: int) -> Tensor:
    """Indices of the targets in start..start+count−1."""
    return ((targets >= start) & (targets < start + count)).nonzero().squeeze(1)


def _softmax_statistics(logits: Tensor, entropy: bool, kept: KeptTile | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy (0 unless asked) of logits [R, C], row by row; overwrites the logits, fills `kept`."""
    top = logits.amax(dim=1)
    shift = top.masked_fill(top == -math.inf, 0.0)  # −inf − −inf is NaN
    shifted = logits.sub_(shift[:, None])
    if kept is not None:
        kept.top[: len(shift)] = shift
        exponentials = torch.exp(shifted, out=kept.exponentials[: len(shift)])
    else:
        exponentials = shifted.exp() if entropy else shifted.exp_()
    total = exponentials.sum(dim=1)
    if not entropy:
        return shift + total.log(), torch.zeros_like(total)
    mean = torch.linalg.vecdot(exponentials, shifted.clamp_(min=-1e4)) / total
    return shift + total.log(), (total.log() - mean).masked_fill(total == 0, 0.0)
