"""Decode attention over a paged KV cache, and the write of rotated keys into it, in plain torch."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo_kernels.reference.checks import computing_dtype
from fastgrpo_kernels.types import PagedLayout

_NOTHING = -1e30
"""Score of a token that does not count. Finite, so that attention to nothing is 0 and not NaN."""


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
    """`fastgrpo_kernels.rope_and_cache` in plain torch."""
    heads, half = query.shape[1], query.shape[2] // 2
    both = torch.cat((query, key), dim=1)  # [T, Hq + Hkv, D]
    cos, sin = cos[:, None], sin[:, None]
    wide = both.to(torch.promote_types(both.dtype, cos.dtype))
    rotated = wide * cos
    rotated[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    rotated = rotated.to(query.dtype)
    keys = rotated[:, heads:]
    if len(slots) and int(slots.amin()) < 0:
        kept = slots >= 0
        slots, keys, value = slots[kept], keys[kept], value[kept]
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slots, keys.to(key_cache.dtype))
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slots, value.to(value_cache.dtype))
    return rotated[:, :heads].contiguous()


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    grouped: bool | None = None,
) -> Tensor:
    """`fastgrpo_kernels.paged_attention` in plain torch; reads the lengths on the host.

    `grouped` None means True. What the cache holds past a length is read but never counts, whatever it is.
    """
    rows, heads, width = query.shape
    if rows == 0:
        return query.new_empty(query.shape)
    caches, kv_heads = (key_cache, value_cache), key_cache.shape[2]
    queries = query.reshape(rows, kv_heads, heads // kv_heads, width)  # [B, Hkv, R, D]
    own, own_lse = _attend(queries, caches, layout.suffix_tables, layout.suffix_lens, scale)
    bounds = layout.cu_prefix_rows.tolist()
    sizes = [end - start for start, end in pairwise(bounds)]
    count = max((p + 1 for p, size in enumerate(sizes) if size), default=0)  # prefixes in use
    if count == 0:
        return own.reshape(rows, heads, width).to(query.dtype)
    tables, lens = layout.prefix_tables[:count], layout.prefix_lens[:count]
    ids = layout.prefix_ids.clamp(0, count - 1).long()
    if grouped is False:
        shared, shared_lse = _attend(queries, caches, tables[ids], lens[ids], scale)
    else:
        largest, starts = max(sizes), layout.cu_prefix_rows
        group_rows = starts[:count, None] + torch.arange(largest, device=query.device)  # [P, G]
        packed = queries[group_rows.clamp(max=rows - 1)].transpose(1, 2).flatten(2, 3)  # [P, Hkv, G · R, D]
        place = ids * largest + torch.arange(rows, device=query.device) - starts[ids]  # row b in [P · G]
        place = place.clamp(0, count * largest - 1)  # rows without a prefix are anywhere
        shared, shared_lse = (
            part.unflatten(2, (largest, -1)).transpose(1, 2).flatten(0, 1)[place]
            for part in _attend(packed, caches, tables, lens, scale)
        )
    shared_lse = shared_lse.masked_fill((layout.prefix_ids < 0)[:, None, None], -math.inf)
    # exp(a) / (exp(a) + exp(b)) is sigmoid(a − b): the share that the prefix has of all weights.
    merged = torch.lerp(own, shared, torch.sigmoid(shared_lse - own_lse)[..., None].to(own.dtype))
    return merged.reshape(rows, heads, width)


def _attend(
    queries: Tensor, caches: tuple[Tensor, Tensor], tables: Tensor, lens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries [N, Hkv, M, D] to N page tables: outputs like them, and log-sum-exp [N, Hkv, M]."""
    pages, page_size = caches[0].shape[:2]
    size = max(1, -(-int(lens.amax()) // page_size)) * page_size
    unused = torch.arange(size, device=lens.device) >= lens[:, None]  # [N, size]
    used_pages = tables[:, : size // page_size].clamp(0, pages - 1).flatten()
    dead = unused.flatten().nonzero().squeeze(1)
    keys, values = (
        cache.index_select(0, used_pages).flatten(0, 1).index_fill_(0, dead, 0.0).unflatten(0, (len(tables), size))
        for cache in caches
    )
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [N, Hkv, size, D]
    bias = torch.zeros(unused.shape, dtype=computing_dtype(queries), device=lens.device)
    bias = bias.masked_fill_(unused, _NOTHING)[:, None, None]
    if queries.device.type == "cpu":
        # What scaled_dot_product_attention runs on CPU; it alone also returns the log-sum-exp. Half the time of below.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=bias, scale=scale
        )
    scores = (queries @ keys.transpose(-1, -2)).to(bias.dtype) * scale + bias
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse
