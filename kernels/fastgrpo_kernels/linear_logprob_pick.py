"""Picks how `linear_logprob` computes its logits: the fastest way on the user's GPU whose results agree."""

import torch
from torch import Tensor

from fastgrpo_kernels.autopick import pick
from fastgrpo_kernels.linear_logprob_gemm import POINTERS, TileBuffers, launch_logits, ways

_ROWS = 2048
"""That candidates are timed on: 16 row blocks of 128, as many as share a column block."""
_COLUMNS = 16_384
"""Fewer are not worth measuring."""
_COMPARED_ROWS = 16
"""Of the timed ones, how many rows' exponentials are compared one by one, and not in sums over tiles."""


def pick_way(hidden: Tensor, weight: Tensor, count: Tensor, buffers: TileBuffers) -> str:
    """One of the names of `ways`. Measuring overwrites the buffers' first rows.

    Args:
        hidden: [R, H]
        weight: [V, H]
        count: [1] int64, as for `launch_logits`.
    """
    candidates = ways(hidden, weight)
    if len(candidates) == 1 or len(hidden) < _ROWS or len(weight) < _COLUMNS:
        return POINTERS
    sample, written, rows = hidden[:_ROWS], buffers.rows(_ROWS), count.clamp(max=_ROWS)

    def compute(name: str) -> TileBuffers:
        launch_logits(sample, weight, rows, written, 1.0, candidates[name])
        return written

    expected: list[Tensor] = []

    def agrees(found: TileBuffers) -> bool:
        seen = _summary(found, rows)
        expected.extend(() if expected else _summary(compute(POINTERS), rows))
        pairs = zip(seen, expected, strict=True)
        return all(torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2, equal_nan=True) for ours, theirs in pairs)

    # The number of columns varies from chunk to chunk, but does not change which way is fastest.
    shape = (hidden.shape[1], buffers.weighted is not None, buffers.exponentials is not None)
    calls = {name: lambda name=name: compute(name) for name in candidates}
    return pick("linear_logprob", shape, hidden, calls, default=POINTERS, agrees=agrees)


def _summary(buffers: TileBuffers, count: Tensor) -> list[Tensor]:
    """Copies in float32 of what the first `count` rows hold, exponentials summed by tile; 0 in the other rows."""
    found = [x.clone() for x in buffers[:3] if x is not None]
    exponentials = buffers.exponentials
    if exponentials is not None:
        by_tile = exponentials.view(*buffers.maximum.shape, -1)
        found += [by_tile.sum(-1, dtype=torch.float32), exponentials[:_COMPARED_ROWS].float()]
    return [x.masked_fill_((torch.arange(len(x), device=x.device) >= count)[:, None], 0.0) for x in found]
