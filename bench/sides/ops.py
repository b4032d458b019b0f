"""The shapes that are measured. Of each op, the shape that its ratios are taken at comes first."""

import torch

from sides import Op
from sides.attention import AttentionShape, attention_op, decode_op
from sides.head import head_op
from sides.loss import loss_op
from sides.rope import rope_op
from sides.sample import SETTINGS, sample_op

VOCABULARY = 151_936


def ops_of(device: str, scale: str) -> list[Op]:
    """What `bench_kernels.py` measures."""
    if scale == "tiny":
        return [head_op(64, 32, 1000, torch.float32, device), loss_op(512, device), *decode_ops(device, scale)]
    if device == "cpu":
        head = head_op(2048, 256, VOCABULARY, torch.float32, device)
        return [head, loss_op(1 << 16, device), *decode_ops(device, scale)]
    heads = [
        head_op(1024 * thousands, hidden_size, VOCABULARY, torch.bfloat16, device)
        for hidden_size in (1536, 2048, 3584)
        for thousands in (16, 32, 4, 64)
    ]
    losses = [loss_op(tokens, device) for tokens in (1 << 16, 1 << 18, 1 << 20)]
    return [*heads, *losses, *decode_ops(device, scale)]


def decode_ops(device: str, scale: str) -> list[Op]:
    """The ops of a decode step: Qwen2-VL-2B's sizes on a GPU, a small model's on a CPU."""
    if device == "cuda" and scale == "full":
        shapes = [AttentionShape(rows, 8, 700, 324) for rows in (64, 256, 512, 8)]
        decode = [decode_op(shape, torch.bfloat16, device) for shape in shapes]
        attention = [attention_op(shapes[1], torch.bfloat16, device, grouped) for grouped in (None, True, False)]
        rope = [rope_op(rows, 12, 2, 128, torch.bfloat16, device) for rows in (256, 64)]
        settings = [(64, "top_k"), (256, "top_k"), (64, "plain"), (256, "plain"), (256, "filtered"), (256, "greedy")]
        samples = [sample_op(rows, VOCABULARY, setting, device) for rows, setting in settings]
        return [*decode, *samples, *attention, *rope]
    rows, vocabulary = (8, 1000) if scale == "tiny" else (32, 4096)
    shape = AttentionShape(rows, 4, 40, 24, 4, 2, 32)
    return [
        decode_op(shape, torch.float32, device),
        attention_op(shape, torch.float32, device),
        rope_op(rows, 4, 2, 32, torch.float32, device),
        *(sample_op(rows, vocabulary, setting, device) for setting in SETTINGS),
    ]


def step_ops(device: str, scale: str) -> list[Op]:
    """Head and loss at a step's size."""
    if scale == "full":
        return [head_op(16_384, 1536, VOCABULARY, torch.bfloat16, device), loss_op(65_536, device)]
    return ops_of(device, "tiny")[:2]


def odd_ops(device: str, scale: str, dtype: torch.dtype) -> list[Op]:
    """Shapes that fill no tile: aligned, one off, and prime."""
    if scale == "full":
        heads = [(1024, 1536, 32_000), (257, 2048, 50_257), (1, 896, VOCABULARY)]
        shapes = [AttentionShape(8, 8, 700, 324), AttentionShape(33, 3, 129, 17), AttentionShape(64, 8, 16, 1, 28, 4)]
        tokens, rows, vocabulary = [64, 65_536], [1, 64], VOCABULARY
    else:
        heads, shapes = [(67, 48, 501)], [AttentionShape(6, 3, 19, 5, 4, 2, 32)]
        tokens, rows, vocabulary = [128], [64], 501
    return [
        *(head_op(*shape, dtype, device) for shape in heads),
        *(loss_op(count, device) for count in tokens),
        *(attention_op(shape, dtype, device, grouped) for shape in shapes for grouped in (True, False)),
        *(decode_op(shape, dtype, device) for shape in shapes),
        *(rope_op(count, 12, 2, 128, dtype, device) for count in (1, 300)),
        *(sample_op(count, vocabulary, setting, device) for count in rows for setting in SETTINGS),
    ]
