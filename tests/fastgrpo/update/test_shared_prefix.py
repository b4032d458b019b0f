"""Shared-prefix attention against full attention over each completion's own prompt, in float64."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.model.attention import named_backend, pick_attention
from fastgrpo.model.segments import Segments
from fastgrpo.update import shared_prefix
from fastgrpo.update.packing import SharedPrefixLayout
from fastgrpo.update.shared_prefix import shared_prefix_attention

GROUPS = {
    "one group": [(7, [5, 1, 3])],
    "several": [(4, [2, 2]), (11, [6, 1, 9, 3]), (1, [4])],
    "without completions": [(3, []), (5, [2, 8]), (6, [])],
    "prompts alone": [(9, []), (2, [])],
    "one token each": [(1, [1]), (1, [1, 1])],
    "long": [(90, [70, 33, 1, 64])],
}


def layout_of(groups: Sequence[tuple[int, Sequence[int]]]) -> SharedPrefixLayout:
    prompts = [prompt for prompt, _ in groups]
    return SharedPrefixLayout(
        sum(prompts),
        Segments.of(prompts),
        Segments.of([n for _, own in groups for n in own], tiles=[len(own) for _, own in groups if own]),
        Segments.of([sum(own) for _, own in groups], prompts),
    )


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[tuple[int, Sequence[int]]],
    window: int = 10**6,
    softcap: float | None = None,
) -> Tensor:
    """Plain attention under a [T, T] mask, in float64: the truth."""
    places = [torch.arange(prompt) for prompt, _ in groups]
    places += [torch.arange(prompt, prompt + n) for prompt, lengths in groups for n in lengths]
    place = torch.cat(places)
    tokens, heads = len(q), q.shape[1]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    prompt_start, start = 0, sum(prompt for prompt, _ in groups)
    for prompt, lengths in groups:
        own = slice(prompt_start, prompt_start + prompt)
        seen[own, own] = torch.ones(prompt, prompt, dtype=torch.bool).tril()
        for n in lengths:
            seen[start : start + n, own] = True
            seen[start : start + n, start : start + n] = torch.ones(n, n, dtype=torch.bool).tril()
            start += n
        prompt_start += prompt
    seen &= place[:, None] - place < window
    wide_k, wide_v = (t.double().repeat_interleave(heads // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), wide_k) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), wide_v)


def inputs(groups: Sequence[tuple[int, Sequence[int]]], heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = sum(prompt + sum(lengths) for prompt, lengths in groups)
    sizes = [(tokens, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, 16)]
    return [(2 * torch.randn(size, generator=draw)).to(dtype).requires_grad_() for size in sizes]


def with_gradients(out: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = torch.autograd.grad((out.double() * weight).sum(), leaves)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *found), strict=True))


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 2e-6),
        ("math", torch.float32, 2e-6),
        ("cpu", torch.float64, 1e-13),
        ("math", torch.float64, 1e-13),
        ("cpu", torch.bfloat16, 2.5e-2),
        ("math", torch.bfloat16, 2.5e-2),
        ("math", torch.float16, 3e-3),
    ],
)
def test_output_and_gradients(case: str, kv_heads: int, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    groups = GROUPS[case]
    leaves = inputs(groups, 4, kv_heads, dtype)
    ours = with_gradients(shared_prefix_attention(*leaves, layout_of(groups), backend=backend), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = with_gradients(full_attention(*exact, groups), exact)
    scale = max(truth[name].norm().item() for name in ("dq", "dk", "dv"))
    for name, value in truth.items():
        assert ours[name].dtype == dtype
        error = (ours[name].double() - value).norm().item()
        assert error <= tolerance * max(value.norm().item(), 0.1 * scale if name != "out" else 0.0), name


@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_large_scores_stay_finite(backend: str) -> None:
    """One side of the merge may outweigh the other beyond what exp holds."""
    groups = GROUPS["several"]
    leaves = [(40 * leaf).detach().requires_grad_() for leaf in inputs(groups, 4, 2, torch.float32)]
    ours = with_gradients(shared_prefix_attention(*leaves, layout_of(groups), backend=backend), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = with_gradients(full_attention(*exact, groups), exact)
    assert all(value.isfinite().all() for value in ours.values())
    assert (ours["out"] - truth["out"]).norm() <= 1e-4 * truth["out"].norm()


def test_nothing_is_read_that_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.full_like(tensor, math.nan)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    groups = GROUPS["without completions"]
    leaves = inputs(groups, 4, 2, torch.float32)
    found = with_gradients(shared_prefix_attention(*leaves, layout_of(groups)), leaves)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("window", [None, 8])
def test_soft_caps(case: str, window: int | None) -> None:
    groups = GROUPS[case]
    leaves = inputs(groups, 4, 2, torch.float64)
    capped = shared_prefix_attention(*leaves, layout_of(groups), window=window, softcap=1.5)
    ours = with_gradients(capped, leaves)
    truth = with_gradients(full_attention(*leaves, groups, window or 10**6, 1.5), leaves)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("window", [1, 3, 8, 60])
@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_windows(case: str, window: int, backend: str) -> None:
    groups = GROUPS[case]
    leaves = inputs(groups, 4, 2, torch.float64)
    layout = layout_of(groups)
    ours = with_gradients(shared_prefix_attention(*leaves, layout, window=window, backend=backend), leaves)
    truth = with_gradients(full_attention(*leaves, groups, window), leaves)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, atol=1e-12, rtol=1e-10, msg=name)


def test_the_scale_is_the_callers() -> None:
    groups = GROUPS["several"]
    q, k, v = (leaf.detach() for leaf in inputs(groups, 4, 2, torch.float64))
    scaled = shared_prefix_attention(q, k, v, layout_of(groups), scale=0.7 / 4)
    assert torch.allclose(scaled, full_attention(0.7 * q, k, v, groups))


def test_a_layout_of_other_tokens_is_refused() -> None:
    leaves = inputs(GROUPS["several"], 4, 2, torch.float32)
    with pytest.raises(ValueError, match="the layout 16: pass the layout of this batch"):
        shared_prefix_attention(*leaves, layout_of(GROUPS["one group"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flex", "attn_backend='flex' is not valid: use one of auto, varlen"),
        ("varlen", "attn_backend='varlen' cannot serve cpu, torch.float32, heads of 16"),
        ("flash_attn", "cannot serve cpu"),
    ],
)
def test_a_backend_that_cannot_work_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pick_attention(torch.zeros(3, 2, 16), name)


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "name"),
    [
        ("cpu", torch.float32, 16, "cpu"),
        ("cpu", torch.bfloat16, 64, "cpu"),
        ("cpu", torch.float16, 64, "math"),
        ("cuda", torch.bfloat16, 128, "varlen"),
        ("cuda", torch.float16, 64, "varlen"),
        ("cuda", torch.float32, 64, "math"),
        ("cuda", torch.bfloat16, 20, "math"),
        ("cuda", torch.bfloat16, 512, "math"),
    ],
)
def test_the_backend_follows_the_tensors(device: str, dtype: torch.dtype, head_size: int, name: str) -> None:
    with FakeTensorMode():
        assert pick_attention(torch.empty(3, 2, head_size, dtype=dtype, device=device)).name == name


@pytest.mark.parametrize("case", GROUPS)
def test_the_cuda_backend_calls_torchs_operators_as_they_are_declared(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments and shapes alone, on the meta device; the numbers need a GPU."""
    monkeypatch.setattr(shared_prefix, "pick_attention", lambda q, forced: named_backend("varlen"))
    groups = GROUPS[case]
    q, k, v = (leaf.detach().to("meta").requires_grad_() for leaf in inputs(groups, 4, 2, torch.bfloat16))
    out = shared_prefix_attention(q, k, v, layout_of(groups))
    found = torch.autograd.grad(out.sum(), [q, k, v])
    assert out.shape == q.shape
    assert [gradient.shape for gradient in found] == [q.shape, k.shape, v.shape]
