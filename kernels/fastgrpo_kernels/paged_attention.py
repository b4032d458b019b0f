"""Decode attention over a paged KV cache in which rows may share the pages of their prefix.

`decode_attention` also rotates queries and keys and writes the new keys and values first.
"""

from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.attention_launch import is_worth_grouping, launch_attention
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import check_caches, shape_of
from fastgrpo_kernels.types import PagedLayout


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    grouped: bool | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale · q·K) V of one query per row, over the row's prefix and then its own tokens. [B, Hq, D].

    A row without any tokens gives 0. Query head h reads KV head h // (Hq / Hkv). No gradients.

    Args:
        query: [B, Hq, D].
        key_cache: [pages, page_size, Hkv, D], contiguous.
        value_cache: the same.
        layout: which pages each row reads, on the same device.
        grouped: whether a prefix is read once for all rows that share it. Both give the same result up to rounding.
            None: where prefix tables have room for `attention_launch.GROUPED_FROM_TOKENS`. Torch always does.
        window: only the last so many tokens of a row are read, each row on its own; None: all.
        softcap: scores s become softcap · tanh(s / softcap); None: they stay.

    Raises:
        ValueError: shapes that do not fit, or caches that are not contiguous.
    """
    check_attention(query, key_cache, value_cache, layout)
    check_kind(window, softcap)
    name = pick_backend(query, backend)
    if name == "torch":
        return cpu.paged_attention(query, key_cache, value_cache, layout, scale=scale, window=window, softcap=softcap)
    if grouped is None:
        grouped = is_worth_grouping(layout, key_cache)
    return _operator(
        query,
        key_cache,
        value_cache,
        layout.suffix_tables,
        layout.suffix_lens,
        layout.prefix_tables,
        layout.prefix_lens,
        layout.prefix_ids,
        layout.cu_prefix_rows,
        scale,
        grouped,
        window or 0,
        softcap or 0.0,
    )


def check_kind(window: int | None, softcap: float | None) -> None:
    """Raises a ValueError for a window that sees nothing, or a cap that is not positive."""
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} is not valid: use a positive number, or None.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is not valid: use 1 or more, or None for all tokens.")


def check_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout) -> None:
    """Raises a ValueError where shapes do not fit or caches are not contiguous."""
    check_caches(key_cache, value_cache)
    kv_heads, width = key_cache.shape[2:]
    if query.ndim != 3 or query.shape[2] != width or query.shape[1] % kv_heads:
        raise ValueError(
            f"query {shape_of(query)} does not fit caches {shape_of(key_cache)}: pass [B, Hq, D], Hq a multiple of Hkv."
        )
    rows, prefixes = len(query), len(layout.prefix_lens)
    if layout.suffix_tables.shape[:1] != (rows,) or layout.suffix_lens.shape != (rows,):
        raise ValueError(
            f"suffix_tables {shape_of(layout.suffix_tables)}, suffix_lens {shape_of(layout.suffix_lens)} do not fit "
            f"query {shape_of(query)}: pass [B, S] and [B]."
        )
    if layout.prefix_ids.shape != (rows,) or layout.cu_prefix_rows.shape != (prefixes + 1,):
        raise ValueError(
            f"prefix_ids {shape_of(layout.prefix_ids)}, cu_prefix_rows {shape_of(layout.cu_prefix_rows)} do not fit "
            f"{rows} rows and prefix_lens {shape_of(layout.prefix_lens)}: pass [B] and [P + 1]."
        )


def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
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
    return launch_attention(query, key_cache, value_cache, layout, scale, grouped, window=window, softcap=softcap)


def _fake(query: Tensor, *_: Tensor | float | bool) -> Tensor:
    return query.new_empty(query.shape)


_operator = register_operator(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor suffix_tables, Tensor suffix_lens, "
    "Tensor prefix_tables, Tensor prefix_lens, Tensor prefix_ids, Tensor cu_prefix_rows, float scale, bool grouped, "
    "int window, float softcap) -> Tensor",
    _paged_attention,
    _fake,
)
