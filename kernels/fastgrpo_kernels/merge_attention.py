"""Merges attentions over two sets of keys into the attention over both."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.tl_utils import launch

BLOCK_TOKENS = 32


def merge_attention(
    first: Tensor,
    first_lse: Tensor,
    second: Tensor,
    second_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Writes softmax attention over two sets of keys, from that over each and its log-sum-exp. No gradients.

    Computed in float32 and rounded once. The log-sum-exps must be finite.

    Args:
        first, second: [T, H, D].
        first_lse, second_lse: [H, T] float32.
        out: [T, H, D], written.
        lse: [H, T] float32, written; like out it may be a part of a larger tensor.

    Raises:
        ValueError: shapes that do not fit.
    """
    tokens, heads, _ = first.shape
    shapes = [shape_of(x) for x in (first, second, out)] + [shape_of(x) for x in (first_lse, second_lse, lse)]
    if shapes != [shape_of(first)] * 3 + [[heads, tokens]] * 3:
        raise ValueError(f"attention and log-sum-exps {shapes} do not fit: pass three [T, H, D] and three [H, T].")
    if pick_backend(first, backend) == "torch":
        reference.merge_attention(first, first_lse, second, second_lse, out, lse)
    else:
        _operator(first, first_lse, second, second_lse, out, lse)


def _launch(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    assert out.stride(2) == lse.stride(1) == 1
    first, second = (x if x.stride(2) == 1 else x.contiguous() for x in (first, second))
    first_lse, second_lse = (x if x.stride(1) == 1 else x.contiguous() for x in (first_lse, second_lse))
    tokens, heads, width = first.shape
    if tokens:
        launch(
            _merge_kernel,
            (triton.cdiv(tokens, BLOCK_TOKENS), heads),
            first,
            first_lse,
            second,
            second_lse,
            out,
            lse,
            tokens,
            *first.stride()[:2],
            *second.stride()[:2],
            *out.stride()[:2],
            first_lse.stride(0),
            second_lse.stride(0),
            lse.stride(0),
            WIDTH=width,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_WIDTH=triton.next_power_of_2(width),
            num_warps=4,
        )


def _fake(*_: Tensor) -> None:
    return None


_operator = register_operator(
    "merge_attention(Tensor first, Tensor first_lse, Tensor second, Tensor second_lse, Tensor(a!) out, "
    "Tensor(b!) lse) -> ()",
    _launch,
    _fake,
)


# What follows the number of tokens differs from one micro-batch to the next: each kind would be compiled anew.
@triton.jit(
    do_not_specialize=["tokens", "first_lse_stride", "second_lse_stride", "lse_stride"],
    do_not_specialize_on_alignment=["first_lse", "second_lse", "lse"],
)
def _merge_kernel(
    first: tl.tensor,
    first_lse: tl.tensor,
    second: tl.tensor,
    second_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tokens: tl.tensor,
    first_stride_token: tl.tensor,
    first_stride_head: tl.tensor,
    second_stride_token: tl.tensor,
    second_stride_head: tl.tensor,
    out_stride_token: tl.tensor,
    out_stride_head: tl.tensor,
    first_lse_stride: tl.tensor,
    second_lse_stride: tl.tensor,
    lse_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Some tokens of one head: out = a first + (1 − a) second with a = sigmoid(first_lse − second_lse)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1).to(tl.int64)
    there = token < tokens
    a = tl.load(first_lse + head * first_lse_stride + token, mask=there, other=0.0)
    b = tl.load(second_lse + head * second_lse_stride + token, mask=there, other=0.0)
    largest = tl.maximum(a, b)
    weight_a, weight_b = tl.exp(a - largest), tl.exp(b - largest)
    total = weight_a + weight_b
    tl.store(lse + head * lse_stride + token, largest + tl.log(total), mask=there)

    d = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = there[:, None] & (d < WIDTH)
    token = token[:, None]
    one = tl.load(first + token * first_stride_token + head * first_stride_head + d, mask=mask).to(tl.float32)
    two = tl.load(second + token * second_stride_token + head * second_stride_head + d, mask=mask).to(tl.float32)
    merged = one * (weight_a / total)[:, None] + two * (weight_b / total)[:, None]
    target = out + token * out_stride_token + head * out_stride_head + d
    tl.store(target, merged.to(out.dtype.element_ty), mask=mask)


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: 2B and 7B."""

    def case(heads: int) -> Callable[[], None]:
        def run() -> None:
            part = torch.empty(11200, heads, 128, dtype=torch.bfloat16, device="meta")
            lse = torch.empty(heads, 16384, dtype=torch.float32, device="meta")
            own = torch.empty(heads, 11200, dtype=torch.float32, device="meta")
            _launch(part, own, part, own, part, lse[:, 5184:])

        return run

    for heads in (12, 28):
        yield f"merge_attention {heads}", case(heads)
