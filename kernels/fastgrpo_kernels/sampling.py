"""Drawing one token per row from logits, with both of its log-probs.

No sort: a truncation is a least score, found by bisection; then one scan over the vocabulary, cut into splits, and a
merge. Left out: the fusion with the LM head's matrix product; no measurement asked for it yet.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fastgrpo_kernels import reference
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.sampling_kernels import least_score_kernel, scan_kernel, winner_kernel
from fastgrpo_kernels.tl_utils import launch
from fastgrpo_kernels.types import SampleOutput, SampleParams

PROGRAMS = 512
"""How many programs the splits of the vocabulary aim at: about four for each multiprocessor of a large GPU."""

SCAN_BLOCK = 1024
BISECT_BLOCK = 2048
"""Tokens that a program takes at once."""


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
        return reference.sample(logits, params, seeds=seeds, counters=counters, seen=seen, suppressed=suppressed)
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
    top_k, top_p, min_p = (
        not greedy and flag for flag in (0 < params.top_k < vocabulary, params.top_p < 1, params.min_p > 0)
    )
    truncate = top_k or top_p or min_p
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, sampling_logprobs, least = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if rows == 0:
        return SampleOutput(tokens, logprobs, sampling_logprobs)

    # Never read where PENALISE or SUPPRESS is off: any pointer will do.
    seen_bytes = seen.contiguous().view(torch.uint8) if penalise and seen is not None else tokens
    suppressed_bytes = tokens if suppressed is None else suppressed.contiguous().view(torch.uint8)
    inverse_temperature = 1.0 if greedy else 1.0 / params.temperature
    scaling = (inverse_temperature, params.repetition_penalty)
    flags = {"PENALISE": penalise, "SUPPRESS": suppressed is not None}
    if truncate:
        launch(
            least_score_kernel,
            (rows,),
            logits,
            seen_bytes,
            suppressed_bytes,
            least,
            logits.stride(0),
            vocabulary,
            *scaling,
            float(params.top_k),
            params.top_p,
            math.log(params.min_p) if min_p else 0.0,
            **flags,
            TOP_K=top_k,
            TOP_P=top_p,
            MIN_P=min_p,
            BLOCK=BISECT_BLOCK,
            num_warps=8,
        )
    blocks = triton.cdiv(vocabulary, SCAN_BLOCK)
    blocks_per_split = triton.cdiv(blocks, triton.cdiv(PROGRAMS, rows))
    splits = triton.cdiv(blocks, blocks_per_split)
    sums = torch.empty((rows, splits, 5), dtype=torch.float32, device=logits.device)
    best_tokens = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    launch(
        scan_kernel,
        (rows, splits),
        logits,
        seen_bytes,
        suppressed_bytes,
        least,
        seeds.contiguous(),
        counters.contiguous(),
        sums,
        best_tokens,
        logits.stride(0),
        vocabulary,
        blocks_per_split * SCAN_BLOCK,
        *scaling,
        **flags,
        TRUNCATE=truncate,
        GREEDY=greedy,
        BLOCK=SCAN_BLOCK,
        num_warps=4,
    )
    launch(
        winner_kernel,
        (rows,),
        logits,
        seen_bytes,
        sums,
        best_tokens,
        tokens,
        logprobs,
        sampling_logprobs,
        logits.stride(0),
        vocabulary,
        *scaling,
        splits,
        PENALISE=penalise,
        DIFFERENT=penalise or suppressed is not None or truncate,
        BLOCK_S=triton.next_power_of_2(splits),
        num_warps=1,
    )
    return SampleOutput(tokens, logprobs, sampling_logprobs)


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
        "filtered": SampleParams(0.7, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    }
    for name, params in settings.items():
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (8, 64, 256, 512):
                yield f"sample {name} {dtype} B={rows}", case(rows, dtype, params)
