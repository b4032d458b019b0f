"""`rope_and_cache` against the formula in float64, in plain torch and under Triton's interpreter."""

import math
from collections.abc import Iterator

import pytest
import torch
from fastgrpo_kernels import reference, rope_and_cache
from fastgrpo_kernels.backend import Backend
from rounding import assert_within, unit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

BACKENDS: list[Backend] = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """`torch.empty` and the like give NaN in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin in float64."""
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def rotated_sizes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """|x·cos| + |rotate_half(x)·sin|: what rounding errors are relative to."""
    low, high = sin.abs().chunk(2, dim=-1)
    return rotated(x.abs(), cos.abs(), torch.cat((-low, high), dim=-1))


def packed(
    tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value as views of one projection, and cos, sin whose halves differ."""
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width).to(DEVICE, dtype)
    query, key, value = qkv.view(tokens, heads + 2 * kv_heads, width).split([heads, kv_heads, kv_heads], dim=1)
    angle = torch.rand(tokens, width, device=DEVICE) * 2 * math.pi
    return query, key, value, angle.cos(), angle.sin()


def rotate(implementation: str, *arguments: Tensor) -> Tensor:
    """`rope_and_cache` on a backend, or as the reference has it."""
    if implementation == "reference":
        return reference.rope_and_cache(*arguments)
    return rope_and_cache(*arguments, backend=implementation)  # type: ignore[arg-type]


def poisoned_cache(page_size: int, kv_heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.full((6, page_size, kv_heads, width), math.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("implementation", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 32), (4, 2, 64), (6, 1, 80), (7, 1, 96), (14, 2, 128)])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_queries_rotate_and_keys_and_values_land_in_their_slots(
    implementation: str, heads: int, kv_heads: int, width: int, page_size: int
) -> None:
    tokens = 5
    query, key, value, cos, sin = packed(tokens, heads, kv_heads, width, torch.float32)
    key_cache, value_cache = (poisoned_cache(page_size, kv_heads, width, torch.float32) for _ in range(2))
    slots = torch.tensor([3, 6 * page_size - 1, -1, 0, 2 * page_size], device=DEVICE)

    output = rotate(implementation, query, key, value, cos, sin, key_cache, value_cache, slots)

    torch.testing.assert_close(output.double(), rotated(query, cos, sin), atol=1e-6, rtol=1e-6)
    written = slots >= 0
    flat_keys, flat_values = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    expected = rotated(key, cos, sin)[written]
    torch.testing.assert_close(flat_keys[slots[written]].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(flat_values[slots[written]], value[written])
    untouched = torch.ones(len(flat_keys), dtype=torch.bool, device=DEVICE)
    untouched[slots[written]] = False
    assert flat_keys[untouched].isnan().all()
    assert flat_values[untouched].isnan().all()


@pytest.mark.parametrize("implementation", [*BACKENDS, "reference"])
@pytest.mark.parametrize("angle_dtype", [torch.float16, torch.float32])
def test_half_precision_is_rounded_once(implementation: str, angle_dtype: torch.dtype) -> None:
    query, key, value, cos, sin = packed(9, 4, 2, 64, torch.float16)
    cos, sin = cos.to(angle_dtype), sin.to(angle_dtype)
    caches = [poisoned_cache(16, 2, 64, torch.float16) for _ in range(2)]
    slots = torch.arange(9, device=DEVICE)
    output = rotate(implementation, query, key, value, cos, sin, *caches, slots)
    assert output.dtype == torch.float16
    exact, sizes = rotated(query, cos, sin), rotated_sizes(query, cos, sin)
    assert_within(output, exact, 3 * unit(angle_dtype) * sizes + unit(torch.float16) * exact.abs())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter mis-computes bfloat16")
@pytest.mark.parametrize("tokens", [1, 300])
def test_bfloat16_on_the_gpu(tokens: int) -> None:
    query, key, value, cos, sin = packed(tokens, 12, 2, 128, torch.bfloat16)
    caches = [torch.zeros(32, 16, 2, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    slots = torch.randperm(512, device=DEVICE)[:tokens]
    output = rope_and_cache(query, key, value, cos, sin, *caches, slots)
    torch.testing.assert_close(output.double(), rotated(query, cos, sin), atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(caches[0].flatten(0, 1)[slots].double(), rotated(key, cos, sin), atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_written_token(backend: Backend) -> None:
    for tokens in (0, 3):
        query, key, value, cos, sin = packed(tokens, 2, 1, 32, torch.float32)
        caches = [poisoned_cache(16, 1, 32, torch.float32) for _ in range(2)]
        slots = torch.full((tokens,), -1, device=DEVICE)
        output = rope_and_cache(query, key, value, cos, sin, *caches, slots, backend=backend)
        assert output.shape == (tokens, 2, 32)
        assert output.isfinite().all()
        assert all(cache.isnan().all() for cache in caches)


def test_shapes_and_layouts_that_do_not_fit_are_refused() -> None:
    query, key, value, cos, sin = packed(4, 4, 2, 32, torch.float32)
    cache, slots = poisoned_cache(16, 2, 32, torch.float32), torch.arange(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"key \[4, 1, 32\]"):
        rope_and_cache(query, key[:, :1], value, cos, sin, cache, cache, slots)
    with pytest.raises(ValueError, match=r"slots \[3\]"):
        rope_and_cache(query, key, value, cos, sin, cache, cache, slots[:3])
    with pytest.raises(ValueError, match="cos"):
        rope_and_cache(query, key, value, cos[:, :16], sin, cache, cache, slots)
    with pytest.raises(ValueError, match="contiguous"):
        rope_and_cache(query, key, value, cos, sin, cache[:, ::2], cache[:, ::2], slots)
    with pytest.raises(ValueError, match="key_cache"):
        rope_and_cache(query, key, value, cos, sin, cache, cache[:3], slots)


def test_a_fake_cuda_tensor_takes_the_triton_branch_without_running_it() -> None:
    with FakeTensorMode():
        query, key = torch.empty(3, 4, 32, device="cuda"), torch.empty(3, 2, 32, device="cuda")
        angle, cache = torch.empty(3, 32, device="cuda"), torch.empty(5, 16, 2, 32, device="cuda")
        slots = torch.empty(3, dtype=torch.int64, device="cuda")
        output = rope_and_cache(query, key, key, angle, angle, cache, cache, slots)
        assert output.shape == query.shape
        assert output.device.type == "cuda"
