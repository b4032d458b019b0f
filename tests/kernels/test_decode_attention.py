"""`decode_attention` writes what `rope_and_cache` writes and attends as `paged_attention` does after it."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from fastgrpo_kernels import PagedLayout, attention_launch, decode_attention, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(
    groups: list[tuple[int, list[int]]],
    idle: int = 0,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Groups of (prefix length, each row's own tokens, the new one among them), then idle rows; pages in disorder."""
    torch.manual_seed(0)
    suffixes = [length for _, lengths in groups for length in lengths] + [0] * idle
    prefixes = [length for length, _ in groups]
    counts = [-(-length // page_size) for length in [*prefixes, *suffixes]]
    order = torch.randperm(sum(counts) + 2).tolist()

    def tables(lengths: list[int]) -> Tensor:
        pages = [[order.pop() for _ in range(-(-length // page_size))] for length in lengths]
        columns = max(map(len, pages)) + 1
        return torch.tensor([own + [10**9] * (columns - len(own)) for own in pages], dtype=torch.int32)

    prefix_tables, suffix_tables = tables(prefixes), tables(suffixes)
    last = [length - 1 for length in suffixes]
    slots = [
        int(table[n // page_size]) * page_size + n % page_size if n >= 0 else -1
        for n, table in zip(last, suffix_tables, strict=True)
    ]
    ids = [p for p, (_, lengths) in enumerate(groups) for _ in lengths] + [-1] * idle
    bounds = [0, *accumulate(len(lengths) for _, lengths in groups)]
    integers = (torch.tensor(x, dtype=torch.int32) for x in (suffixes, prefixes, ids, bounds))
    lens, prefix_lens, prefix_ids, cu_rows = (x.to(DEVICE) for x in integers)
    packed = torch.randn(len(ids), heads + 2 * kv_heads, width).to(DEVICE, dtype)
    angle = 6.3 * torch.rand(len(ids), width, device=DEVICE)
    caches = [torch.randn(sum(counts) + 2, page_size, kv_heads, width).to(DEVICE, dtype) for _ in range(2)]
    return {
        **dict(zip(("query", "key", "value"), packed.split([heads, kv_heads, kv_heads], dim=1), strict=True)),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "slots": torch.tensor(slots, device=DEVICE),
        "layout": PagedLayout(
            suffix_tables.to(DEVICE), lens, prefix_tables.to(DEVICE), prefix_lens, prefix_ids, cu_rows
        ),
        "scale": width**-0.5,
    }


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, **{name: inputs[name].clone() for name in ("key_cache", "value_cache")}}


def check(inputs: dict[str, Any], tolerance: float) -> None:
    """Both backends against the reference."""
    plain, rounding = copied(inputs), 2 * torch.finfo(inputs["query"].dtype).eps
    expected = reference.decode_attention(**plain)
    for backend in ("torch", "triton"):
        mine = copied(inputs)
        output = decode_attention(**mine, backend=backend)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=rounding)
        for name in ("key_cache", "value_cache"):
            changed = (mine[name] != inputs[name]).any(dim=-1).any(dim=-1).flatten().nonzero().flatten()
            assert changed.tolist() == sorted(slot for slot in inputs["slots"].tolist() if slot >= 0)
            torch.testing.assert_close(mine[name], plain[name], atol=tolerance, rtol=rounding)


GROUPS = [(300, [1, 16, 17, 150]), (5, [2, 64, 65]), (40, [1])]


@pytest.mark.parametrize("tiling", attention_launch.TILINGS)
def test_every_tiling_gives_the_same(tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "TILINGS", {tiling: attention_launch.TILINGS[tiling]})
    check(make_inputs(GROUPS, idle=2), 3e-6)
    check(make_inputs(GROUPS, idle=1, heads=6, kv_heads=1, dtype=torch.float16), 2e-3)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(7, 1, 96), (12, 2, 80), (2, 2, 64)])
def test_prefixes_read_row_by_row_and_odd_sizes(heads: int, kv_heads: int, width: int) -> None:
    """Their tables have little room."""
    check(make_inputs([(20, [1, 3, 20]), (0, [1, 5])], idle=1, heads=heads, kv_heads=kv_heads, width=width), 3e-6)


@pytest.mark.parametrize("window", [1, 6, 20, 280])
def test_windows(window: int) -> None:
    check(make_inputs(GROUPS, idle=2) | {"window": window}, 3e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_soft_caps(window: int | None) -> None:
    check(make_inputs(GROUPS, idle=2) | {"softcap": 0.7, "window": window}, 3e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_rows_that_read_what_others_write(window: int | None) -> None:
    """Three tokens of one sequence, the last one first."""
    inputs = make_inputs([(300, [40, 39, 38]), (5, [2])])
    layout, slot = inputs["layout"], int(inputs["slots"][0])
    layout.suffix_tables[1:3] = layout.suffix_tables[0]
    slots = torch.tensor([slot, slot - 1, slot - 2, int(inputs["slots"][3])], device=DEVICE)
    check(inputs | {"layout": replace(layout, is_shared=True), "slots": slots, "window": window}, 3e-6)


def test_without_angles_nothing_is_rotated() -> None:
    inputs = make_inputs(GROUPS, idle=2)
    still = inputs | {"cos": torch.ones_like(inputs["cos"]), "sin": torch.zeros_like(inputs["sin"])}
    expected = reference.decode_attention(**copied(still))
    for backend in ("torch", "triton"):
        mine = copied(inputs) | {"cos": None, "sin": None}
        torch.testing.assert_close(decode_attention(**mine, backend=backend), expected, atol=3e-6, rtol=1e-5)


def test_more_rows_of_a_group_than_a_tile_holds() -> None:
    check(make_inputs([(260, [1 + i % 3 for i in range(11)]), (7, [40])], heads=12), 3e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter mis-computes bfloat16")
@pytest.mark.parametrize("tiling", attention_launch.TILINGS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (28, 4)])
def test_bfloat16_on_the_gpu(heads: int, kv_heads: int, tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "TILINGS", {tiling: attention_launch.TILINGS[tiling]})
    groups = [(700, [1, 16, 100, 324, 33, 7, 64, 700]), (5, [12] * 8), (0, [3])]
    check(make_inputs(groups, 2, heads=heads, kv_heads=kv_heads, width=128, dtype=torch.bfloat16), 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="tilings are measured on a GPU")
def test_every_tiling_is_right_where_they_are_measured() -> None:
    inputs = make_inputs([(700, [300] * 8)] * 4, heads=12, width=128, dtype=torch.bfloat16)
    synthetic = attention_launch.Synthetic(inputs["query"], inputs["key_cache"], inputs["layout"], rotate=True)
    for name, tiling in attention_launch.TILINGS.items():
        assert synthetic.agrees(synthetic.call(tiling, grouped=True)()), name


def test_what_tilings_are_measured_on_fits_its_own_check() -> None:
    inputs = make_inputs(GROUPS, idle=2)
    synthetic = attention_launch.Synthetic(inputs["query"], inputs["key_cache"], inputs["layout"], rotate=True)
    for tiling in attention_launch.TILINGS.values():
        result = synthetic.call(tiling, grouped=True)()
        assert synthetic.agrees(result)
        assert not synthetic.agrees(result * 1.1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(GROUPS)
    with pytest.raises(ValueError, match="key"):
        decode_attention(**{**inputs, "key": inputs["query"]})
    with pytest.raises(ValueError, match="slots"):
        decode_attention(**{**inputs, "slots": inputs["slots"][:2]})


def test_a_fake_cuda_tensor_takes_the_triton_branch_without_running_it() -> None:
    with FakeTensorMode():

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device="cuda")

        query, key = torch.empty(3, 4, 32, device="cuda"), torch.empty(3, 2, 32, device="cuda")
        angle, cache = torch.empty(3, 32, device="cuda"), torch.empty(9, 16, 2, 32, device="cuda")
        layout = PagedLayout(integers(3, 2), integers(3), integers(2, 20), integers(2), integers(3), integers(3))
        slots = torch.empty(3, dtype=torch.int64, device="cuda")
        output = decode_attention(query, key, key, angle, angle, cache, cache, slots, layout, scale=1.0)
        assert output.shape == query.shape
        assert output.device.type == "cuda"
