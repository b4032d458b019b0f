"""A decode step's attention in one op: rotary embedding, cache write, attention over the paged cache."""

from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.attention_launch import NewTokens, is_worth_grouping, launch_attention
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.kv_cache import rope_and_cache
from fastgrpo_kernels.paged_attention import check_attention, check_kind, paged_attention
from fastgrpo_kernels.types import PagedLayout


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`rope_and_cache` of one new token per row, then `paged_attention`, the new tokens included. [B, Hq, D].

    No gradients.

    Args:
        query: [B, Hq, D]; like key and value it may be a view into one packed [B, (Hq + 2 Hkv) · D].
        key: [B, Hkv, D].
        value: [B, Hkv, D].
        cos: [B, D] of each row's new position, float32 or the queries' dtype; None, as `sin`: rotated already.
        sin: [B, D].
        key_cache: [pages, page_size, Hkv, D], contiguous, written in place.
        value_cache: the same.
        slots: [B] int64, where the row's new token (the last of its own in `layout`) is written; −1: nowhere, for a
            row without tokens of its own.
        layout: which pages each row reads, including the new token.
        window: only the last so many tokens of a row are read, the new one included; None: all.
        softcap: scores s become softcap · tanh(s / softcap); None: they stay.

    Raises:
        ValueError: shapes that do not fit, or caches that are not contiguous.
    """
    check_attention(query, key_cache, value_cache, layout)
    check_kind(window, softcap)
    rows, _, width = query.shape
    if key.shape != value.shape or key.shape != (rows, key_cache.shape[2], width) or width % 2:
        raise ValueError(
            f"key {shape_of(key)}, value {shape_of(value)} do not fit query {shape_of(query)} and caches "
            f"{shape_of(key_cache)}: pass twice [B, Hkv, D], with D even."
        )
    is_torch = pick_backend(query, backend) == "torch"
    if cos is None or sin is None:
        if is_torch:
            cpu.write_cache(key, value, key_cache, value_cache, slots)
            return cpu.paged_attention(
                query, key_cache, value_cache, layout, scale=scale, window=window, softcap=softcap
            )
        cos, sin = query.new_ones(rows, width), query.new_zeros(rows, width)
    if cos.shape != (rows, width) or sin.shape != cos.shape or slots.shape != (rows,):
        raise ValueError(
            f"cos {shape_of(cos)}, sin {shape_of(sin)}, slots {shape_of(slots)} do not fit query {shape_of(query)}: "
            "pass [B, D], [B, D] and [B]."
        )
    if is_torch:
        rotated = cpu.rope_and_cache(query, key, value, cos, sin, key_cache, value_cache, slots)
        return cpu.paged_attention(rotated, key_cache, value_cache, layout, scale=scale, window=window, softcap=softcap)
    if layout.is_shared:  # the fused kernel has no order among its rows
        rotated = rope_and_cache(query, key, value, cos, sin, key_cache, value_cache, slots, backend=backend)
        return paged_attention(
            rotated, key_cache, value_cache, layout, scale=scale, window=window, softcap=softcap, backend=backend
        )
    return _operator(
        query,
        key,
        value,
        cos,
        sin,
        key_cache,
        value_cache,
        slots,
        layout.suffix_tables,
        layout.suffix_lens,
        layout.prefix_tables,
        layout.prefix_lens,
        layout.prefix_ids,
        layout.cu_prefix_rows,
        scale,
        is_worth_grouping(layout, key_cache),
        window or 0,
        softcap or 0.0,
    )


def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    suffix_tables: Tensor,
    suffix_lens: Tensor,
    prefix_tables: Tensor,
    prefix_lens: Tensor,
    prefix_ids: Tensor,
    cu_prefix_rows: Tensor,
    scale: float,
    grouped: bool,
    window: int,
    softcap: float,
) -> Tensor:
    layout = PagedLayout(suffix_tables, suffix_lens, prefix_tables, prefix_lens, prefix_ids, cu_prefix_rows)
    new = NewTokens(key, value, cos, sin, slots)
    return launch_attention(query, key_cache, value_cache, layout, scale, grouped, new, window, softcap)


def _fake(query: Tensor, *_: Tensor | float | bool) -> Tensor:
    return query.new_empty(query.shape)


_operator = register_operator(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slots, Tensor suffix_tables, Tensor suffix_lens, Tensor prefix_tables, "
    "Tensor prefix_lens, Tensor prefix_ids, Tensor cu_prefix_rows, float scale, bool grouped, int window, "
    "float softcap) -> Tensor",
    _decode_attention,
    _fake,
)
