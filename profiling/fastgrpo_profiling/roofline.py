"""Compares what a step must compute and move with the machine's limits, measured in the same run.

Model FLOPs count necessary work once. A group's picture and prompt are encoded once, not per completion; logits are
computed for completion tokens only; a frozen tower encodes a picture once a step, since its features can be cached. So
the MFUs of two implementations differ only by their time: repeated work counts for neither.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device."""

    flops_per_s: float
    """Of a large matrix product."""
    bytes_per_s: float
    """Read and written by a large copy."""
    dtype: str

    @property
    def text(self) -> str:
        """As text."""
        giga = self.flops_per_s / 1e9
        flops = f"{giga / 1e3:,.0f} TFLOP/s" if giga > 1e4 else f"{giga:,.0f} GFLOP/s"
        return f"{flops} ({self.dtype}), {self.bytes_per_s / 1e9:,.1f} GB/s"


def measure_ceilings(device: str, dtype: torch.dtype, *, repeats: int = 5) -> Ceilings:
    """Times a matrix product (`measure_flops`) and a copy (1 GiB on a GPU, 128 MiB on a CPU); the best of each."""
    copied = 2**30 if device == "cuda" else 2**27
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        flops_per_s=measure_flops(device, dtype, repeats=repeats),
        bytes_per_s=2 * copied / _best_seconds(lambda: target.copy_(source), device, repeats),
        dtype=str(dtype).removeprefix("torch."),
    )


def measure_flops(device: str, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product, 8192 wide on a GPU, 1024 on a CPU; the best of `repeats`, after a warm-up.

    Takes some 10 ms on a GPU, 0.1 to 0.2 s on a CPU core. Does not use torch's global generator.
    """
    size = 8192 if device == "cuda" else 1024
    draw = torch.Generator(device).manual_seed(0)  # random: with zeros, a GPU would clock higher than in real work
    left, right = (torch.randn(size, size, device=device, generator=draw).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device, repeats)


def _best_seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine the cost of a decoder and, if there is one, its vision tower."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    vision_layers: int = 0
    vision_hidden: int = 0
    vision_mlp_weights: int = 0
    """Weights of one block's MLP."""
    vision_window: int = 0
    """Patches in a window of a windowed block; 0: all blocks attend to the whole picture."""
    vision_whole_layers: int = 0
    """Blocks that attend to the whole picture if the others are windowed."""
    patch_dim: int = 0
    merged_patches: int = 1
    """Patches that become one token."""

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """Reads a transformers config of the Llama or Qwen kind, with or without a Qwen2-VL-like vision tower."""
        text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", None)
        seeing = {}
        if vision is not None:
            width: int = getattr(vision, "embed_dim", None) or vision.hidden_size
            inner: int = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
            matrices = 3 if vision.hidden_act == "silu" else 2  # gated or not
            channels: int = vision.in_channels if hasattr(vision, "in_channels") else vision.in_chans
            seeing = {
                "vision_layers": vision.depth,
                "vision_hidden": width,
                "vision_mlp_weights": matrices * width * inner,
                "vision_window": (getattr(vision, "window_size", None) or 0) ** 2 // vision.patch_size**2,
                "vision_whole_layers": len(getattr(vision, "fullatt_block_indexes", None) or ()),
                "patch_dim": channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2,
                "merged_patches": vision.spatial_merge_size**2,
            }
        return cls(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
            vocab=text.vocab_size,
            **seeing,
        )

    @classmethod
    def known(cls, config: Any) -> "ModelShape | None":
        """As `from_config`; None for configs with other field names, and for mixtures of experts."""
        text = getattr(config, "text_config", config)
        if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        try:
            return cls.from_config(config)
        except AttributeError:
            return None

    @property
    def layer_weights(self) -> int:
        """Matrix entries of one decoder layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def text_parameters(self) -> int:
        """Matrix entries of the decoder, a tied head counted once."""
        return self.layers * self.layer_weights + self.hidden * self.vocab

    @property
    def vision_parameters(self) -> int:
        """Matrix entries of the vision tower and its merger."""
        width = self.vision_hidden
        merged = width * self.merged_patches
        blocks = self.vision_layers * (4 * width**2 + self.vision_mlp_weights)
        return blocks + self.patch_dim * width + merged * (merged + self.hidden) * (width > 0)

    @property
    def parameters(self) -> int:
        """Matrix entries of the whole model."""
        return self.text_parameters + self.vision_parameters

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token in a half-precision KV cache, all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def text_flops(self, tokens: float, pairs: float) -> float:
        """Forward pass of the decoder layers over `tokens` with `pairs` attended (query, key) pairs."""
        return self.layers * (2 * self.layer_weights * tokens + 4 * self.heads * self.head_dim * pairs)

    def head_flops(self, tokens: float) -> float:
        """Logits of `tokens`."""
        return 2 * self.hidden * self.vocab * tokens

    def vision_flops(self, patches: int) -> float:
        """Forward pass of the vision tower over one picture."""
        width = self.vision_hidden
        products = 2 * (4 * width**2 + self.vision_mlp_weights) * patches
        whole = self.vision_whole_layers if self.vision_window else self.vision_layers
        windowed = min(self.vision_window, patches) * (self.vision_layers - whole)
        attention = 4 * width * patches * (patches * whole + windowed)
        merged = width * self.merged_patches
        merger = 2 * merged * (merged + self.hidden) * (patches / self.merged_patches)
        return 2 * self.patch_dim * width * patches + self.vision_layers * products + attention + merger


@dataclass(frozen=True)
class StepWork:
    """What one step was asked to do, in tokens."""

    prompts: Sequence[int]
    """Tokens of each distinct prompt, image tokens included."""
    pictures: Sequence[int]
    """Patches of each distinct picture."""
    completions: Sequence[Sequence[int]]
    """Tokens of each completion, by prompt."""

    def __add__(self, other: "StepWork") -> "StepWork":
        """The work of both."""
        return StepWork(
            [*self.prompts, *other.prompts],
            [*self.pictures, *other.pictures],
            [*self.completions, *other.completions],
        )

    @property
    def completion_tokens(self) -> int:
        return sum(map(sum, self.completions))

    @property
    def prompt_pairs(self) -> float:
        """(query, key) pairs that attend within prompts."""
        return sum(p * (p + 1) / 2 for p in self.prompts)

    @property
    def fed_tokens(self) -> int:
        """Completion tokens that the decoder reads: all but each completion's last, which predicts nothing."""
        return sum(max(c - 1, 0) for group in self.completions for c in group)

    @property
    def fed_pairs(self) -> float:
        """(query, key) pairs whose query is one of these."""
        groups = zip(self.prompts, self.completions, strict=True)
        return sum((c - 1) * (p + c / 2) for p, group in groups for c in group if c > 0)


NOTHING = StepWork([], [], [])


@dataclass(frozen=True)
class Update:
    """Which passes an update makes, and which weights get gradients."""

    reference_pass: bool
    """Whether the objective needs a frozen model's log-probs (beta above 0)."""
    old_logprobs_pass: bool = False
    """Whether log-probs are taken of the whole rollout before the first update on it."""
    text_trains: bool = True
    """The decoder's own weights have gradients; adapters, next to nothing to compute, do not count."""
    vision_trains: bool = True
    """The vision tower's weights have gradients."""
    vision_adapts: bool = False
    """Adapters in the tower have gradients, which pass through it although its own weights are frozen."""


def rollout_flops(shape: ModelShape, drawn: StepWork) -> dict[str, float]:
    """Model FLOPs of drawing completions, by phase."""
    tokens = drawn.fed_tokens
    return {
        "vision": sum(map(shape.vision_flops, drawn.pictures)),
        "prefill": shape.text_flops(sum(drawn.prompts), drawn.prompt_pairs) + shape.head_flops(len(drawn.prompts)),
        "decode": shape.text_flops(tokens, drawn.fed_pairs) + shape.head_flops(tokens),
    }


def update_flops(shape: ModelShape, trained: StepWork, update: Update) -> dict[str, float]:
    """Model FLOPs of an update on `trained`, by phase.

    A backward pass costs one forward pass for activations and, where weights train, another for weights.
    """
    tokens = sum(trained.prompts) + trained.fed_tokens
    pairs = trained.prompt_pairs + trained.fed_pairs
    vision = sum(map(shape.vision_flops, trained.pictures)) * (update.vision_trains or update.vision_adapts)
    forward = vision + shape.text_flops(tokens, pairs)
    head = shape.head_flops(trained.completion_tokens)
    passes = 1 + update.text_trains
    return {
        "reference": (forward + head) * update.reference_pass,
        "forward": forward,
        "head": head,
        "backward": (1 + update.vision_trains) * vision + shape.text_flops(passes * tokens, 2 * pairs) + passes * head,
    }


def step_flops(shape: ModelShape, drawn: StepWork, update: Update, trained: StepWork | None = None) -> dict[str, float]:
    """Model FLOPs of a GRPO step by phase.

    Args:
        drawn: the rollout; `NOTHING` for a further update on an earlier one.
        trained: the part of it that has a gradient; None: all.
    """
    flops = rollout_flops(shape, drawn) | update_flops(shape, drawn if trained is None else trained, update)
    if update.old_logprobs_pass:
        once = update_flops(shape, drawn, update)
        flops["old log-probs"] = once["forward"] + once["head"]
    return flops


def decode_bytes(shape: ModelShape, work: StepWork, *, bytes_per_value: int) -> float:
    """Minimum memory traffic of decoding all completions at once: per step, weights and each key and value once.

    A prompt's keys and values are read once for its whole group. A completion's first token needs no step of its own.
    """
    steps = [[max(c - 1, 0) for c in group] for group in work.completions]
    longest = max((c for group in steps for c in group), default=0)
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocab
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim
    read = sum(
        p * max(group, default=0) + sum(c * (c + 1) / 2 for c in group)
        for p, group in zip(work.prompts, steps, strict=True)
    )
    return bytes_per_value * (weights * longest + kv * read)


@dataclass(frozen=True)
class Utilisation:
    """How much of the machine a step used."""

    mfu: float
    """Model FLOPs of the step ÷ (its seconds × the measured ceiling)."""
    by_phase: Mapping[str, float]
    """The same per phase with attributed time."""
    decode_bandwidth: float | None
    """Least traffic of decode ÷ (its seconds × the measured ceiling)."""


def utilisation(
    flops: Mapping[str, float],
    decode_traffic: float,
    step_seconds: Sequence[float],
    phases: Mapping[str, float],
    ceilings: Ceilings,
) -> Utilisation:
    """For the median step; `phases` are its seconds by phase (`phases.phase_seconds`).

    If the head has no time of its own, it ran inside the forward pass.
    """
    spent = {name: seconds for name, seconds in phases.items() if seconds > 0}
    if "head" not in spent and "head" in flops:
        flops = {**flops, "forward": flops["forward"] + flops["head"], "head": 0.0}
    known = [name for name in flops if name in spent and flops[name] > 0]
    by_phase = {name: flops[name] / (spent[name] * ceilings.flops_per_s) for name in known}
    decode = spent.get("decode")
    return Utilisation(
        mfu=sum(flops.values()) / (statistics.median(step_seconds) * ceilings.flops_per_s),
        by_phase=by_phase,
        decode_bandwidth=decode_traffic / (decode * ceilings.bytes_per_s) if decode else None,
    )
