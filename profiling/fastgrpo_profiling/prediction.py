"""Predicts a training step's time on a GPU from FLOPs, bytes and launches, before anything runs there.

A phase takes its matrix products at the measured product rate, its attention at a measured share of that rate, its
elementwise work at the measured copy rate, and the cost of launches. The shares of each ceiling, in `Efficiency`, come
from a first run on an H100 (`bench/results/h100-first-step.json`) and a second one on an H200. So this predicts other
sizes, cards and counts; agreement with those two runs proves nothing.
"""

from dataclasses import dataclass

from fastgrpo_profiling.roofline import ModelShape, StepWork


@dataclass(frozen=True)
class Gpu:
    """Measured ceilings of a card."""

    name: str
    flops_per_s: float
    """Of a large bfloat16 product on random data."""
    bytes_per_s: float
    """Read and written by a large copy."""
    memory_bytes: float
    """Available to a process."""


GPUS = {
    "h100": Gpu("H100 80GB HBM3", 776e12, 2.97e12, 83.7e9),
    "h200": Gpu("H200", 777e12, 4.12e12, 149e9),
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of a ceiling that were reached on an H100 by the code of the first run."""

    attention: float = 0.28
    """Of the product rate, by flash attention of packed groups and of pictures: 220 TFLOP/s."""
    elementwise: float = 0.80
    """Of the copy rate, by kernels that read and write activations once."""
    decode_head: float = 0.88
    """Of the copy rate, by the head's product over 64 rows: 181 and 128 us."""
    graph_gap_s: float = 0.46e-6
    """Between two kernels of a replayed graph."""


@dataclass(frozen=True)
class Counts:
    """What an implementation moves and launches. Bytes are per token (or patch) and layer, without weights."""

    text_forward_bytes: float
    text_backward_bytes: float
    vision_forward_bytes: float
    vision_backward_bytes: float
    decode_product_s: float
    """Time of a decode layer's product beyond reading its weights. By cuBLAS, four took 51 us on an H100 (31.5 at the
    copy rate) and 43 us on an H200 (22.7); ours, with the activation, 45.5 us on an H100."""
    decode_elementwise: int
    """Kernels of a decode layer beside products and attention."""
    small_kernel_s: float
    """Time of one of them: almost only overhead, since it moves little."""
    decode_attention_s: float
    """Time of a layer's decode attention beyond reading keys and values."""
    sample_s: float
    """Time to sample 64 rows of 151,936 logits with top-k, on an H100."""
    head_share: float
    """Share of the product rate reached by the head's three products and the passes between them."""
    checkpointing: bool
    images_in_step: bool
    """Whether the GPU waits while pictures are prepared."""
    prefill_host_s: float
    """Host time of vision and prefill that the GPU waits for."""
    half_reference: bool


BEFORE = Counts(
    text_forward_bytes=375e3,
    text_backward_bytes=761e3,
    vision_forward_bytes=266e3,
    vision_backward_bytes=479e3,
    decode_product_s=4.9e-6,
    decode_elementwise=8,
    small_kernel_s=2.8e-6,
    decode_attention_s=16e-6,
    sample_s=0.68e-3,
    head_share=0.53,
    checkpointing=True,
    images_in_step=True,
    prefill_host_s=0.2,
    half_reference=False,
)
"""The code that the first GPU run measured: eager elementwise work, eight small kernels in a decode layer."""

NOW = Counts(
    text_forward_bytes=102e3,
    text_backward_bytes=170e3,
    vision_forward_bytes=54e3,
    vision_backward_bytes=100e3,
    decode_product_s=3.6e-6,
    decode_elementwise=2,
    small_kernel_s=1.9e-6,
    decode_attention_s=6e-6,
    sample_s=0.09e-3,
    head_share=0.79,
    checkpointing=True,
    images_in_step=False,
    prefill_host_s=0.03,
    half_reference=True,
)
"""The current code: fused elementwise work (counted by `tests/fastgrpo/update/test_fused_layers.py`), eight kernels per
decode layer. Decode kernel times are from an H100, sampling's from an H200."""

VERIFY_KERNELS, GUESS_KERNELS = 86, 26
"""What a step with guesses launches beyond its layers' work: counted in `SpeculativeRunner.verify`."""
HEAD_PRODUCTS = 3
IMAGE_S = 0.025
"""Preparing one picture of 401,408 pixels on the host: 0.2 s for eight, measured."""


def decode_step_seconds(
    gpu: Gpu, shape: ModelShape, rows: int, kv_bytes: float, counts: Counts, *, guesses: int = 0
) -> dict[str, float]:
    """Seconds of one decode step (a token for every row), by part.

    Args:
        kv_bytes: keys and values read, all layers: a prompt's once for its group, a row's own once for each position.
        guesses: tokens guessed for each row, computed with its last one.
    """
    share = Efficiency()
    rows *= guesses + 1
    elementwise = shape.layers * (counts.decode_elementwise + (guesses > 0))  # rotation apart from attention
    more = (VERIFY_KERNELS + GUESS_KERNELS * guesses) * (guesses > 0)
    kernels = shape.layers * (4 + 2) + elementwise + 30 + more

    def weights(count: float, reached: float = 1.0) -> float:
        """Products with so many weights: they wait for memory or, with many rows, compute."""
        return max(2 * count / (gpu.bytes_per_s * reached), 2 * count * rows / gpu.flops_per_s)

    return {
        "products": shape.layers * (weights(shape.layer_weights) + 4 * counts.decode_product_s),
        "head": weights(shape.hidden * shape.vocab, share.decode_head),
        "attention": kv_bytes / gpu.bytes_per_s + shape.layers * counts.decode_attention_s,
        "elementwise": (elementwise + more) * counts.small_kernel_s,
        "sampling": counts.sample_s * rows / 64,
        "gaps": kernels * share.graph_gap_s,
    }


def decode_seconds(gpu: Gpu, shape: ModelShape, work: StepWork, counts: Counts) -> float:
    """All decode steps of a rollout whose completions run together; the longest sets their number."""
    lengths = [max(length - 1, 0) for group in work.completions for length in group]
    steps = max(lengths, default=0)
    own = sum(n * (n + 1) / 2 for n in lengths)
    shared = sum(
        p * max((c - 1 for c in group), default=0) for p, group in zip(work.prompts, work.completions, strict=True)
    )
    mean_kv = shape.kv_bytes * (own + shared) / max(steps, 1)
    return steps * sum(decode_step_seconds(gpu, shape, len(lengths), mean_kv, counts).values())


def step_seconds(
    gpu: Gpu, shape: ModelShape, work: StepWork, counts: Counts, *, micro_batches: int, beta: bool = True
) -> dict[str, float]:
    """A whole step by phase, seconds.

    Args:
        micro_batches: of the update. Each adds its half-precision gradients to the float32 ones.
    """
    share = Efficiency()
    tokens = sum(work.prompts) + work.fed_tokens
    pairs = work.prompt_pairs + work.fed_pairs
    patches = sum(work.pictures)

    def products(flops: float) -> float:
        return flops / gpu.flops_per_s

    def attention(flops: float) -> float:
        return flops / (gpu.flops_per_s * share.attention)

    def moved(size: float) -> float:
        return size / (gpu.bytes_per_s * share.elementwise)

    def text(tokens: float, pairs: float, times: float, size: float) -> float:
        """Products of `times` forward passes; attention's backward computes 5 products to the forward's 2."""
        heavier = 1.25 if times > 1 else 1.0
        return (
            products(times * shape.text_flops(tokens, 0))
            + attention(times * heavier * shape.text_flops(0, pairs))
            + moved(size * tokens * shape.layers)
        )

    picture_flops = sum(map(shape.vision_flops, work.pictures))
    picture_pairs = 4 * shape.vision_hidden * shape.vision_layers * sum(n * n for n in work.pictures)

    def vision(times: float, size: float) -> float:
        heavier = 1.25 if times > 1 else 1.0
        return (
            products(times * (picture_flops - picture_pairs))
            + attention(times * heavier * picture_pairs)
            + moved(size * patches * shape.vision_layers)
        )

    head = shape.head_flops(work.completion_tokens)
    forward = text(tokens, pairs, 1, counts.text_forward_bytes) + vision(1, counts.vision_forward_bytes)
    backward = text(tokens, pairs, 2, counts.text_backward_bytes) + vision(2, counts.vision_backward_bytes)
    found = {
        "images": IMAGE_S * len(work.pictures) * counts.images_in_step,
        "vision": vision(1, counts.vision_forward_bytes),
        "prefill": text(sum(work.prompts), work.prompt_pairs, 1, counts.text_forward_bytes) + counts.prefill_host_s,
        "decode": decode_seconds(gpu, shape, work, counts),
        "sync": (4 + 2) * shape.text_parameters / (gpu.bytes_per_s * share.elementwise),
        "reference": beta * (forward + head / (gpu.flops_per_s * counts.head_share)),
        "forward": forward,
        "recompute": forward * counts.checkpointing,
        "head": HEAD_PRODUCTS * head / (gpu.flops_per_s * counts.head_share),
        "backward": backward,
        "gradient sums": micro_batches * (2 + 4 + 4) * shape.parameters / (gpu.bytes_per_s * share.elementwise),
        # Adam reads four float32 values of each parameter and writes three; clipping reads the gradients.
        "optimizer": (7 + 1) * 4 * shape.parameters / (gpu.bytes_per_s * share.elementwise),
    }
    return {name: seconds for name, seconds in found.items() if seconds > 0}
