"""Decode attention over a paged KV cache, and writing rotated keys to it."""

import torch
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.types import PagedLayout


def rope_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`fastgrpo_kernels.rope_and_cache`."""
    dtype = torch.promote_types(query.dtype, cos.dtype)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.to(dtype).chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
        return (x.to(dtype) * cos[:, None] + turned * sin[:, None]).to(query.dtype)

    kept = slots >= 0
    for cache, new in ((key_cache, rotate(key)), (value_cache, value)):
        cache.flatten(0, 1)[slots[kept]] = new[kept].to(cache.dtype)
    return rotate(query)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`fastgrpo_kernels.paged_attention`: row by row a softmax over the prefix's tokens and the row's own."""
    dtype = computing_dtype(query)
    outputs = torch.zeros_like(query)
    for row, prefix in enumerate(layout.prefix_ids.tolist()):
        slots = _slots(layout.suffix_tables[row], layout.suffix_lens[row], key_cache)
        if prefix >= 0:
            shared = _slots(layout.prefix_tables[prefix], layout.prefix_lens[prefix], key_cache)
            slots = torch.cat((shared, slots))
        if window is not None:
            slots = slots[-window:]
        repeats = query.shape[1] // key_cache.shape[2]
        key, value = (  # [N, Hq, D]
            cache.flatten(0, 1)[slots].to(dtype).repeat_interleave(repeats, dim=1) for cache in (key_cache, value_cache)
        )
        scores = torch.einsum("hd,nhd->hn", query[row].to(dtype), key) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outputs[row] = torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), value)
    return outputs


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`fastgrpo_kernels.decode_attention`: `rope_and_cache`, then `paged_attention`."""
    rotated = rope_and_cache(query, key, value, cos, sin, key_cache, value_cache, slots)
    return paged_attention(rotated, key_cache, value_cache, layout, scale=scale, window=window, softcap=softcap)


def _slots(table: Tensor, length: Tensor, cache: Tensor) -> Tensor:
    """[length] int64: positions of a page table's tokens in a cache with its pages concatenated."""
    token = torch.arange(int(length), device=cache.device)
    page_size = cache.shape[1]
    return table[token // page_size].long() * page_size + token % page_size
