"""What the kernels' benchmarks measure: each op's inputs, sides, exact results and work, in one record."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from attention_sides import (
    AttentionShape,
    attention_errors,
    attention_sides,
    decode_sides,
    exact_attention,
    exact_decode,
    make_attention_inputs,
    make_decode_inputs,
)
from head_sides import exact_head, head_errors, head_sides, make_head_inputs
from loss_sides import exact_loss, loss_errors, loss_sides, make_loss_inputs
from rope_sides import exact_rope, make_rope_inputs, rope_errors, rope_sides
from sample_sides import SETTINGS, exact_sample, make_sample_inputs, sample_errors, sample_sides

OURS = ("fastgrpo", "fastgrpo_recompute")
ERROR_OVER_TORCH, ERROR_OVER_TORCH_PEERS = 1.1, 10.0
"""How many times plain torch's own error, in the same dtype, a side of ours or a peer's may make."""
VOCABULARY = 151_936


class Side(Protocol):
    """One implementation of an op."""

    @property
    def name(self) -> str: ...
    @property
    def forward_only(self) -> bool:
        """Whether its forward pass alone is of interest."""
        ...

    def forward(self, inputs: Any) -> Any: ...
    def forward_backward(self, inputs: Any) -> Any: ...


class Work(NamedTuple):
    """The least an op must do, and what it is counted in."""

    amount: float
    floor: str
    """gemm: FLOPs; copy: bytes."""


@dataclass(frozen=True)
class Op:
    """One op at one shape."""

    name: str
    shape: str
    make_inputs: Callable[[], Any]
    exact: Callable[[Any], Any]
    """Results in float64."""
    errors: Callable[[Any, Any], dict[str, float]]
    """Of results against exact ones."""
    tolerance: float
    """Error that any implementation in this dtype may make."""
    work: Work
    is_small: bool = True
    """A few kernels that take less than their launches do."""

    def fault(self, name: str, errors: dict[str, float], torch_errors: dict[str, float]) -> str:
        """What is wrong with side `name`, if anything."""
        factor = ERROR_OVER_TORCH if name in OURS else ERROR_OVER_TORCH_PEERS
        for key, error in errors.items():
            allowed = factor * torch_errors.get(key, 0.0) + self.tolerance
            if not error <= allowed:  # NaN is wrong too
                return f"error of {key} is {error:.2g}, {allowed:.2g} allowed"
        return ""


def sides_of(op_name: str, device: str) -> tuple[list[Any], dict[str, str]]:
    """The op's sides, ours first, then plain torch; and which peers were left out, and why."""
    if op_name == "head":
        return head_sides(device)
    others: dict[str, Callable[[], list[Any]]] = {
        "loss": loss_sides,
        "attention": attention_sides,
        "decode_attention": decode_sides,
        "rope": rope_sides,
        "sample": sample_sides,
    }
    return others[op_name](), {}


def head_op(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str) -> Op:
    """`linear_logprob`, both passes, the gradient of the weight included."""
    return Op(
        name="head",
        shape=head_shape(tokens, hidden_size, vocabulary, dtype),
        make_inputs=lambda: make_head_inputs(
            tokens, hidden_size, vocabulary, dtype, device, sequences=1 if tokens % 8 else 8
        ),
        exact=exact_head,
        errors=head_errors,
        tolerance=1e-5 if dtype == torch.float32 else 1e-3,
        # What is computed twice counts once: logits, dX and dW.
        work=Work(6.0 * tokens * hidden_size * vocabulary, "gemm"),
        is_small=False,
    )


def head_shape(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> str:
    """The shape's name in tables and records."""
    return f"T={tokens} H={hidden_size} V={vocabulary} {_name(dtype)}"


def loss_op(tokens: int, device: str) -> Op:
    """`grpo_loss` in float32 with KL and metrics, both passes."""
    return Op(
        name="loss",
        shape=f"T={tokens} float32",
        make_inputs=lambda: make_loss_inputs(tokens, device),
        exact=exact_loss,
        errors=loss_errors,
        tolerance=1e-5,
        # Four inputs read and the gradient written, each once.
        work=Work(5.0 * 4 * tokens, "copy"),
    )


def attention_op(shape: AttentionShape, dtype: torch.dtype, device: str, grouped: bool | None = None) -> Op:
    """`paged_attention` of a decode step, one layer. Plain torch gets a dense copy of every row's keys for nothing."""
    way = {None: "", True: " grouped", False: " row by row"}[grouped]
    return Op(
        name="attention",
        shape=f"B={shape.rows} G={shape.group} prefix={shape.prefix} own={shape.suffix} "
        f"{shape.heads}/{shape.kv_heads}x{shape.width} {_name(dtype)}{way}",
        make_inputs=lambda: make_attention_inputs(shape, dtype, device, grouped),
        exact=exact_attention,
        errors=attention_errors,
        tolerance=1e-5 if dtype == torch.float32 else 1e-3,
        work=Work(float(shape.read_bytes(dtype)), "copy"),
    )


def decode_op(shape: AttentionShape, dtype: torch.dtype, device: str) -> Op:
    """`decode_attention`: the same with the new tokens' rotation and write, as a decode step calls it."""
    alone = attention_op(shape, dtype, device)
    return replace(
        alone,
        name="decode_attention",
        make_inputs=lambda: make_decode_inputs(shape, dtype, device),
        exact=exact_decode,
    )


def rope_op(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> Op:
    """`rope_and_cache` of one layer."""
    return Op(
        name="rope",
        shape=f"T={tokens} {heads}/{kv_heads}x{width} {_name(dtype)}",
        make_inputs=lambda: make_rope_inputs(tokens, heads, kv_heads, width, dtype, device),
        exact=exact_rope,
        errors=rope_errors,
        tolerance=1e-6 if dtype == torch.float32 else 1e-3,
        # Read once and written once.
        work=Work(2.0 * tokens * (heads + 2 * kv_heads) * width * dtype.itemsize, "copy"),
    )


def sample_op(rows: int, vocabulary: int, setting: str, device: str) -> Op:
    """`sample` on float32 logits, as the decoder's head gives them; `setting` of `sample_sides.SETTINGS`."""
    return Op(
        name="sample",
        shape=f"B={rows} V={vocabulary} {setting}",
        make_inputs=lambda: make_sample_inputs(rows, vocabulary, setting, device),
        exact=exact_sample,
        errors=sample_errors,
        tolerance=1e-4,
        work=Work(4.0 * rows * vocabulary, "copy"),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ops_of(device: str, scale: str) -> list[Op]:
    """What a run measures; of each op the shape that its ratios are taken at comes first."""
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
