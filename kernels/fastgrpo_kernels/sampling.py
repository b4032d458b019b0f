"""Samples one token per row from logits, with both of its log-probs.

The logits are read once, by many programs per row. Without a truncation they sample while reading, and a merge picks
the winner. A truncation is a minimum score: it is found, and sampled from, in the few chunks that can reach it.

64 rows of 151,936 float32 logits are 39 MB: 13 us at 3 TB/s. An earlier version, with one program searching a row, took
567 us for top_k 50 on an H100, and 55 us for the scan. Not fused with the LM head's matrix product.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.sampling_kernels import scan_kernel, winner_kernel
from fastgrpo_kernels.sampling_top_kernels import chunk_kernel, draw_kernel, hot_kernel
from fastgrpo_kernels.tl_utils import bytes_of, launch, target_arch
from fastgrpo_kernels.types import SampleOutput, SampleParams

PROGRAMS = 1024
"""Target number of programs for the splits: about eight per multiprocessor of a large GPU."""

SCAN_BLOCK = 1024
CHUNK_BLOCK = 4096
WALK_BLOCK = 2048
"""Tokens that a program takes at once."""

SEARCHED = 500
"""Largest top_k that is found from a row's chunks; beyond it, the whole row is searched."""


def sample(
    logits: Tensor,
    params: SampleParams,
    *,
    seeds: Tensor,
    counters: Tensor,
    seen: Tensor | None = None,
    suppressed: Tensor | None = None,
    backend: Backend | None = None,
) -> SampleOutput:
    """Draws a token per row; its randomness is a hash of (seed, counter, token id) and of nothing else.

    Suppression, penalty, temperature, top-k, top-p, min-p, in this order and as Hugging Face defines them, but that
    tokens tied with the last one that a truncation leaves stay too. Ties of the greatest score go to the lowest id.

    Args:
        logits: [B, V], any float dtype; at least one finite and not suppressed in each row.
        seeds: [B] int64, of each row's completion.
        counters: [B] int64, index of the token within its completion.
        seen: [B, V] bool, tokens that `params.repetition_penalty` is for; None: no penalty.
        suppressed: [V] bool, tokens never drawn.

    Raises:
        ValueError: shapes that do not fit; float64 logits on the triton backend.
    """
    rows, vocabulary = logits.shape
    if seeds.shape != (rows,) or counters.shape != (rows,):
        raise ValueError(
            f"seeds {shape_of(seeds)}, counters {shape_of(counters)} do not fit logits {shape_of(logits)}: pass [B]."
        )
    if seen is not None and seen.shape != logits.shape:
        raise ValueError(f"seen {shape_of(seen)} does not fit logits {shape_of(logits)}: pass [B, V].")
    if suppressed is not None and suppressed.shape != (vocabulary,):
        raise ValueError(f"suppressed {shape_of(suppressed)} does not fit logits {shape_of(logits)}: pass [V].")
    name = pick_backend(logits, backend)
    if name == "triton" and logits.dtype == torch.float64:
        raise ValueError("logits are float64, which backend triton does not compute in: cast them, or use torch.")
    if name == "torch":
        return cpu.sample(logits, params, seeds=seeds, counters=counters, seen=seen, suppressed=suppressed)
    p = params
    output = _operator(
        logits, seeds, counters, seen, suppressed, p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty
    )
    return SampleOutput(*output)


def _sample(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    seen: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> SampleOutput:
    params = SampleParams(temperature, top_k, top_p, min_p, repetition_penalty)
    return _launch(logits, params, seeds, counters, seen, suppressed)


def _fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


_operator = register_operator(
    "sample(Tensor logits, Tensor seeds, Tensor counters, Tensor? seen, Tensor? suppressed, float temperature, "
    "int top_k, float top_p, float min_p, float repetition_penalty) -> (Tensor, Tensor, Tensor)",
    _sample,
    _fake,
)


def _launch(
    logits: Tensor,
    params: SampleParams,
    seeds: Tensor,
    counters: Tensor,
    seen: Tensor | None,
    suppressed: Tensor | None,
) -> SampleOutput:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    greedy = params.temperature == 0
    penalise = seen is not None and params.repetition_penalty != 1.0
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    output = SampleOutput(tokens, *(tokens.new_empty(rows, dtype=torch.float32) for _ in range(2)))
    if rows == 0:
        return output
    inputs = _Inputs(
        logits,
        # Not read if PENALISE or SUPPRESS is off, so any pointer will do.
        seen.contiguous().view(torch.uint8) if penalise and seen is not None else tokens,
        tokens if suppressed is None else suppressed.contiguous().view(torch.uint8),
        seeds.contiguous(),
        counters.contiguous(),
        (1.0 if greedy else 1.0 / params.temperature, params.repetition_penalty),
        {"PENALISE": penalise, "SUPPRESS": suppressed is not None},
    )
    if not greedy and (0 < params.top_k < vocabulary or params.top_p < 1 or params.min_p > 0):
        _launch_truncated(inputs, params, output)
    else:
        _launch_whole(inputs, greedy, output)
    return output


class _Inputs(NamedTuple):
    """What all kernels read."""

    logits: Tensor
    seen: Tensor
    """[B, V] uint8, unless PENALISE is off."""
    suppressed: Tensor
    """[V] uint8, unless SUPPRESS is off."""
    seeds: Tensor
    counters: Tensor
    scaling: tuple[float, float]
    """1 / temperature, and the penalty."""
    flags: dict[str, bool]


def _splits(rows: int, vocabulary: int, block: int) -> tuple[int, int]:
    """Number of splits of a row, and tokens of each, in whole blocks."""
    blocks = triton.cdiv(vocabulary, block)
    blocks_per_split = triton.cdiv(blocks, triton.cdiv(PROGRAMS, rows))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split * block


def _launch_whole(inputs: _Inputs, greedy: bool, output: SampleOutput) -> None:
    """Draws from the whole vocabulary."""
    logits = inputs.logits
    rows, vocabulary = logits.shape
    splits, split_size = _splits(rows, vocabulary, SCAN_BLOCK)
    sums = torch.empty((rows, splits, 5), dtype=torch.float32, device=logits.device)
    best_tokens = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    launch(
        scan_kernel,
        (rows, splits),
        *inputs[:5],
        sums,
        best_tokens,
        logits.stride(0),
        vocabulary,
        split_size,
        *inputs.scaling,
        **inputs.flags,
        GREEDY=greedy,
        BLOCK=SCAN_BLOCK,
        num_warps=4,
    )
    launch(
        winner_kernel,
        (rows,),
        logits,
        inputs.seen,
        sums,
        best_tokens,
        *output,
        logits.stride(0),
        vocabulary,
        *inputs.scaling,
        splits,
        PENALISE=inputs.flags["PENALISE"],
        DIFFERENT=any(inputs.flags.values()),
        BLOCK_S=triton.next_power_of_2(splits),
        moved=bytes_of(sums, best_tokens, *output),
        num_warps=1,
    )


def _launch_truncated(inputs: _Inputs, params: SampleParams, output: SampleOutput) -> None:
    """Draws from the tokens that top-k, top-p and min-p keep."""
    logits = inputs.logits
    rows, vocabulary = logits.shape
    top_k, top_p, min_p = 0 < params.top_k < vocabulary, params.top_p < 1, params.min_p > 0
    wanted = min(params.top_k, SEARCHED) if top_k else SEARCHED
    # Room for some ties. Larger chunks for fewer tokens: either way the chunks' tokens fit a program's registers.
    chunk, hot_room = (64, max(16, triton.next_power_of_2(wanted + 4))) if wanted <= 124 else (16, 512)
    chunks = triton.cdiv(vocabulary, chunk)
    # Elsewhere than on sm_90, ptxas left to itself makes do with fewer and spills some.
    registers = None if target_arch() == 90 else 128
    splits, split_size = _splits(max(rows, 32), vocabulary, CHUNK_BLOCK)  # more would fill the last kernel's registers
    maxima, sums, floors = (
        torch.empty(size, dtype=torch.float32, device=logits.device)
        for size in ((rows, chunks), (rows, splits, 4), rows)
    )
    hot, counts = (torch.empty(size, dtype=torch.int32, device=logits.device) for size in ((rows, hot_room), rows))
    launch(
        chunk_kernel,
        (rows, splits),
        *inputs[:3],
        maxima,
        sums,
        logits.stride(0),
        vocabulary,
        chunks,
        split_size,
        *inputs.scaling,
        **inputs.flags,
        MASS=top_p and not top_k,
        CHUNK=chunk,
        BLOCK=CHUNK_BLOCK,
        num_warps=8,
    )
    launch(
        hot_kernel,
        (rows,),
        maxima,
        hot,
        counts,
        floors,
        chunks,
        wanted,
        HOT=hot_room,
        BLOCK=triton.next_power_of_2(chunks),
        num_warps=8 if chunk == 64 else 16,
        maxnreg=registers,
    )
    launch(
        draw_kernel,
        (rows,),
        *inputs[:5],
        hot,
        counts,
        floors,
        sums,
        *output,
        logits.stride(0),
        vocabulary,
        splits,
        *inputs.scaling,
        float(params.top_k),
        params.top_p,
        math.log(params.min_p) if min_p else 0.0,
        wanted,
        **inputs.flags,
        TOP_K=top_k,
        TOP_P=top_p,
        MIN_P=min_p,
        CHUNK=chunk,
        HOT=hot_room,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK=WALK_BLOCK,
        moved=bytes_of(hot, sums, *output) + rows * wanted * logits.element_size(),
        num_warps=8 if chunk * hot_room <= 4096 else 16,
        maxnreg=registers,
    )


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: Qwen2's vocabulary, plain, greedy and with every filter."""

    def case(rows: int, dtype: torch.dtype, params: SampleParams) -> Callable[[], None]:
        def run() -> None:
            logits = torch.empty(rows, 151_936, dtype=dtype, device="meta")
            seeds = torch.empty(rows, dtype=torch.int64, device="meta")
            seen = torch.empty(logits.shape, dtype=torch.bool, device="meta")
            suppressed = torch.empty(logits.shape[1], dtype=torch.bool, device="meta")
            _launch(logits, params, seeds, seeds, seen, suppressed)

        return run

    settings = {
        "plain": SampleParams(),
        "greedy": SampleParams(temperature=0.0),
        "top_k": SampleParams(top_k=50),
        "top_p": SampleParams(top_p=0.9),
        "filtered": SampleParams(0.7, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    }
    for name, params in settings.items():
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (8, 64, 256, 512):
                yield f"sample {name} {dtype} B={rows}", case(rows, dtype, params)
