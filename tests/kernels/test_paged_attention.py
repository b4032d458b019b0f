"""`paged_attention` against a float64 softmax, row by row, in plain torch and under Triton's interpreter."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from fastgrpo_kernels import PagedLayout, paged_attention, reference
from fastgrpo_kernels.backend import Backend
from rounding import assert_within, of_terms, unit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

BACKENDS: list[Backend] = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GARBAGE = [-1, 10**9, -(10**9)]


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """`torch.empty` and the like give NaN in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Rows in groups that share a prefix, over pages in random order; what no token occupies is NaN.

    `groups` holds (prefix length, suffix lengths of its rows); rows of `idle` follow, which have no tokens at all.
    """

    def __init__(
        self,
        groups: Sequence[tuple[int, Sequence[int]]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 32,
        page_size: int = 16,
        idle: int = 0,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.window = window
        torch.manual_seed(0)
        suffixes = [length for _, lengths in groups for length in lengths] + [0] * idle
        prefixes = [length for length, _ in groups]
        pages = sum(-(-length // page_size) for length in [*prefixes, *suffixes])
        order = torch.randperm(pages + 1).tolist()
        shape = (pages + 1, page_size, kv_heads, width)
        self.key_cache, self.value_cache = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))

        def allocate(lengths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
            """Page tables, padded with garbage, and the slots of each entry's tokens."""
            columns = max([-(-length // page_size) for length in lengths], default=0) + 1
            table, slots = torch.tensor(GARBAGE * columns)[:columns].repeat(len(lengths), 1), []
            for i, length in enumerate(lengths):
                own = torch.tensor([order.pop() for _ in range(-(-length // page_size))], dtype=torch.int64)
                table[i, : len(own)] = own
                slots.append((own[:, None] * page_size + torch.arange(page_size)).flatten()[:length])
            for slot in slots:
                for cache in (self.key_cache, self.value_cache):
                    cache.flatten(0, 1)[slot] = torch.randn(len(slot), kv_heads, width).to(dtype)
            return table.int().to(DEVICE), slots

        prefix_tables, prefix_slots = allocate(prefixes)
        suffix_tables, suffix_slots = allocate(suffixes)
        ids = [p for p, (_, lengths) in enumerate(groups) for _ in lengths] + [-1] * idle
        self.slots = [
            torch.cat([prefix_slots[p], own]) if p >= 0 else own for p, own in zip(ids, suffix_slots, strict=True)
        ]
        if window is not None:
            self.slots = [slots[-window:] for slots in self.slots]
        self.query = torch.randn(len(ids), heads, width).to(DEVICE, dtype)
        self.key_cache, self.value_cache = self.key_cache.to(DEVICE), self.value_cache.to(DEVICE)
        bounds = [0, *accumulate(len(lengths) for _, lengths in groups)]
        lens = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (suffixes, prefixes, ids, bounds))
        suffix_lens, prefix_lens, prefix_ids, cu_rows = lens
        self.layout = PagedLayout(suffix_tables, suffix_lens, prefix_tables, prefix_lens, prefix_ids, cu_rows)
        self.scale = width**-0.5

    def run(self, backend: Backend | None, grouped: bool | None) -> Tensor:
        return paged_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.layout,
            scale=self.scale,
            grouped=grouped,
            window=self.window,
            backend=backend,
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        """[B, Hq, D] float64, and how far rounding may take each entry, to first order."""
        outputs, bounds = [], []
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        u = unit(dtype)
        half = unit(self.query.dtype) if dtype != self.query.dtype else 0.0
        for query, slots in zip(self.query.double(), self.slots, strict=True):
            repeats = query.shape[0] // self.key_cache.shape[2]
            key, value = (
                cache.flatten(0, 1)[slots.to(DEVICE)].repeat_interleave(repeats, dim=1).double()
                for cache in (self.key_cache, self.value_cache)
            )
            products = torch.einsum("hd,nhd->hn", query.abs(), key.abs()) * self.scale
            scores = torch.einsum("hd,nhd->hn", query, key) * self.scale
            weights = scores.softmax(dim=-1)
            outputs.append(torch.einsum("hn,nhd->hd", weights, value))
            off = ((of_terms(query.shape[1], dtype) + 4 * u) * products).amax(-1) if len(slots) else products.sum(-1)
            # Of a weight, a split's result, its share of all and their sum: once each in the inputs' dtype.
            shares = 2 * off + of_terms(len(slots), dtype) + 16 * u + 4 * half
            largest = value.abs().amax(0) if len(slots) else torch.zeros_like(query)
            bounds.append(shares[:, None] * largest)
        return torch.stack(outputs), torch.stack(bounds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_reference_is_exact_up_to_rounding(dtype: torch.dtype) -> None:
    case = Case([(40, [3, 0, 33]), (0, [1, 17]), (130, [5])], heads=6, idle=2, dtype=dtype)
    found = reference.paged_attention(case.query, case.key_cache, case.value_cache, case.layout, scale=case.scale)
    assert found.dtype == dtype
    assert_within(found, *case.exact())


def check(case: Case, backend: Backend | None = None) -> None:
    """Grouped and ungrouped: exact up to rounding."""
    exact = case.exact() if len(case.query) else (case.query, 0.0)
    for grouped in (True, False):
        output = case.run(backend, grouped)
        assert output.dtype == case.query.dtype
        assert output.isfinite().all()
        assert_within(output, *exact, f"grouped={grouped}")


# Pairwise over page size, query heads for a KV head, head size, prefix and group size.
SHAPES = [
    (16, 1, 1, 32, 1, 1),
    (32, 2, 2, 64, 15, 2),
    (64, 1, 6, 80, 16, 5),
    (16, 1, 7, 96, 17, 8),
    (32, 1, 7, 128, 64, 3),
    (64, 1, 1, 64, 100, 16),
    (16, 1, 6, 64, 513, 4),
    (32, 2, 1, 80, 513, 2),
    (64, 1, 2, 32, 512, 7),
    (16, 2, 2, 128, 31, 2),
    (32, 1, 6, 32, 0, 4),
    (64, 1, 7, 64, 63, 8),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("page_size", "kv_heads", "group", "width", "prefix", "rows"), SHAPES)
def test_rows_that_share_a_prefix(
    backend: Backend, page_size: int, kv_heads: int, group: int, width: int, prefix: int, rows: int
) -> None:
    suffixes = [(7 * i) % (page_size + 3) for i in range(rows)]  # 0, 1 page and 2 pages among them
    check(
        Case(
            [(prefix, suffixes), (prefix // 2, [1])],
            heads=group * kv_heads,
            kv_heads=kv_heads,
            width=width,
            page_size=page_size,
        ),
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 7, 33, 64, 500])
def test_windows(backend: Backend, window: int) -> None:
    """That end in a row's own tokens, at their start, in its prefix, or see everything."""
    groups = [(40, [3, 0, 33, 7]), (0, [1, 17]), (530, [5, 64]), (31, [33])]
    check(Case(groups, heads=6, idle=2, window=window), backend)
    check(Case([(0, [3, 40])], kv_heads=1, window=window), backend)


def test_a_window_that_sees_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0 is not valid"):
        Case([(4, [3])], window=0).run(None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_groups_empty_ranges_and_idle_rows(backend: Backend) -> None:
    groups = [(40, [3, 0, 33]), (7, []), (0, [1, 17]), (130, [5]), (9, [])]
    case = Case(groups, kv_heads=1, idle=2)
    check(case, backend)
    assert (case.run(backend, True)[-2:] == 0).all()
    assert (case.run(backend, False)[-2:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [[], [(20, [])], [(0, [0, 0])]])
def test_nothing_to_attend_to(backend: Backend, groups: list[tuple[int, list[int]]]) -> None:
    for idle in (0, 2):
        case = Case(groups, idle=idle)
        for grouped in (True, False):
            assert (case.run(backend, grouped) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_tokens_in_a_group_that_has_none_gives_zero_beside_rows_that_have(backend: Backend) -> None:
    case = Case([(0, [0, 5]), (3, [0, 0])])
    check_rows = case.run(backend, True)
    assert (check_rows[0] == 0).all()
    assert (check_rows[1:].abs().amax(dim=(1, 2)) > 0).all()
    torch.testing.assert_close(check_rows, case.run(backend, False), atol=2e-6, rtol=0)


@pytest.mark.parametrize("suffix", [5, 16, 20])
def test_pages_in_order_are_read_where_they_lie(suffix: int) -> None:
    """As the block manager hands them out: completions' pages evenly spaced, a prompt's one behind the other."""
    case = Case([(20, [suffix] * 3), (35, [suffix] * 2)])
    layout, size = case.layout, case.key_cache.shape[1]
    expected = case.run("torch", True)
    columns = -(-suffix // size)
    moved = [
        layout.suffix_tables[:, :columns].flatten(),
        *(table[: -(-int(n) // size)] for table, n in zip(layout.prefix_tables, layout.prefix_lens, strict=True)),
    ]
    order = torch.cat(moved).long()
    bounds = torch.tensor([len(part) for part in moved]).cumsum(0)
    # A layer of a cache that holds several.
    case.key_cache, case.value_cache = torch.stack([case.value_cache[order], case.key_cache[order]]).flip(0)
    prefix_tables = torch.full_like(layout.prefix_tables, 10**9)
    for i, start in enumerate(bounds[:-1].tolist()):
        prefix_tables[i, : len(moved[i + 1])] = torch.arange(start, int(bounds[i + 1]))
    suffix_tables = torch.arange(5 * columns, dtype=torch.int32).view(5, columns).to(DEVICE)
    case.layout = replace(layout, suffix_tables=suffix_tables, prefix_tables=prefix_tables)
    for grouped in (True, False):
        slots = [case.key_cache.shape[0] * size]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            found = case.run("torch", grouped)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        copied = [event for event in profiler.events() if [*slots, *case.key_cache.shape[2:]] in event.input_shapes]
        copied = [event for event in copied if event.name == "aten::index_select"]
        assert len(copied) == 2, "more was copied than two short prefixes"


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_tile_of_64_heads_holds(backend: Backend) -> None:
    check(Case([(33, [1] * 12), (16, [2] * 3)], heads=12, kv_heads=2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_suffixes_long_enough_to_be_split(backend: Backend) -> None:
    check(Case([(600, [520, 3])], heads=2, kv_heads=1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_apart(backend: Backend) -> None:
    case = Case([(50, [20, 3])])
    case.query *= 300
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: Backend) -> None:
    check(Case([(50, [20, 3]), (17, [0, 40])], dtype=torch.float16), backend)


def test_float64_on_cpu_is_exact() -> None:
    check(Case([(50, [20, 3]), (17, [0, 40])], dtype=torch.float64), "torch")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter mis-computes bfloat16")
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (28, 4)])
def test_bfloat16_on_the_gpu(page_size: int, heads: int, kv_heads: int) -> None:
    groups = [(700, [1, 16, 100, 324, 0, 33, 7, 64]), (5, [12] * 8), (0, [3])]
    case = Case(groups, heads=heads, kv_heads=kv_heads, width=128, page_size=page_size, idle=2, dtype=torch.bfloat16)
    check(case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", [20, 300])
def test_grouping_is_chosen_where_it_is_not_given(backend: Backend, prefix: int) -> None:
    case = Case([(prefix, [3, 4])], heads=2, kv_heads=1)
    chosen = case.run(backend, None)
    assert torch.equal(chosen, case.run(backend, backend == "torch" or prefix == 300))


def test_the_queries_may_be_a_strided_view() -> None:
    case = Case([(20, [3, 4])])
    wide = torch.randn(2, 6, 32, device=DEVICE)
    wide[:, :4] = case.query
    case.query = wide[:, :4]
    for backend in BACKENDS:
        check(case, backend)


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case([(20, [3, 4])])
    with pytest.raises(ValueError, match=r"query \[2, 3, 32\]"):
        paged_attention(case.query[:, :3], case.key_cache, case.value_cache, case.layout, scale=1.0)
    with pytest.raises(ValueError, match="suffix_tables"):
        paged_attention(case.query[:1], case.key_cache, case.value_cache, case.layout, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        paged_attention(case.query, case.key_cache[:, ::2], case.value_cache[:, ::2], case.layout, scale=1.0)


def test_a_fake_cuda_tensor_takes_the_triton_branch_without_reading_lengths() -> None:
    with FakeTensorMode():

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device="cuda")

        query, cache = torch.empty(3, 4, 32, device="cuda"), torch.empty(9, 16, 2, 32, device="cuda")
        layout = PagedLayout(integers(3, 2), integers(3), integers(2, 20), integers(2), integers(3), integers(3))
        output = paged_attention(query, cache, cache, layout, scale=1.0)
        assert output.shape == query.shape
        assert output.device.type == "cuda"
