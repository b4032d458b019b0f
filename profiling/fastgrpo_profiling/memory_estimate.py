"""Estimates a training step's memory from shapes, before anything is allocated.

Counts the tensors that grow with the model or the batch. Allocator rounding and library workspaces are in `OVERHEAD`.
"""

from dataclasses import dataclass, replace

from fastgrpo_profiling.roofline import ModelShape

OVERHEAD = 1.5e9
"""Bytes of the CUDA context, library workspaces and fragmentation, beside the counted tensors."""
USABLE = 0.92
"""Of a GPU's memory, what an estimate may fill. The rest is lost between tensors and to other contexts: 5 GB of 85 when
a step of an estimated 80 GB did not fit an H100."""
TOKEN_BUDGET = 16_384
"""Input tokens of a micro-batch where no setting says. With half of them the paper's step fits an H100 unchecked, and
takes longer, 5.2 s for 4.3: the host cannot launch twice the kernels in time."""
HALF, FULL = 2, 4
"""Bytes of a bfloat16 and of a float32 value."""


@dataclass(frozen=True)
class StepSetting:
    """The settings that determine a run's memory. Lengths are upper bounds."""

    prompts: int
    """Of a rollout."""
    group: int
    prompt_tokens: int
    completion_tokens: int
    """0: nothing is drawn, and there is no sampler."""
    picture_patches: int
    """Of all pictures of a prompt."""
    token_budget: int
    """Input tokens of a micro-batch."""
    logprob_bytes: float
    """Scratch of the LM head."""
    checkpointing: bool
    has_reference: bool
    half_reference: bool = True
    """Whether the reference's matrices are in half precision."""
    trained_share: float = 1.0
    """Number of parameters with gradients and optimizer states."""
    world_size: int = 1
    zero_stage: int = 0
    """DeepSpeed's stage: 1 and up shards optimizer states over ranks, 2 and up gradients, 3 weights."""

    @property
    def group_tokens(self) -> int:
        """Tokens of a prompt with all its completions."""
        return self.prompt_tokens + self.group * self.completion_tokens

    @property
    def groups_together(self) -> int:
        """Whole groups in a micro-batch; 1 if a group is split."""
        return min(max(self.token_budget // self.group_tokens, 1), self.prompts)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch. A prompt with one completion is never split."""
        most = max(self.token_budget, self.prompt_tokens + self.completion_tokens)
        return min(self.groups_together * self.group_tokens, most)


def saved_text_bytes(shape: ModelShape) -> int:
    """Bytes per token that one decoder layer saves for its backward pass, elementwise work fused, in half precision.

    Saved are both residuals and both normalised inputs (4 H), queries, keys, values and the attention's output
    (2 Hq D + 2 Hkv D), gate, up and their product (3 I). Eager autocast saves 1.5 times that.
    """
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return HALF * (4 * shape.hidden + attention + 3 * shape.intermediate)


def saved_vision_bytes(shape: ModelShape) -> int:
    """The same per patch of one vision block: 4 W of residuals and norms, 4 W of attention, 2 I of the MLP."""
    if not shape.vision_layers:
        return 0
    inner = shape.vision_mlp_weights // (2 * shape.vision_hidden)
    return HALF * (8 * shape.vision_hidden + 2 * inner)


def step_bytes(shape: ModelShape, setting: StepSetting) -> dict[str, float]:
    """Bytes by purpose on one rank's GPU, training under bfloat16 autocast with float32 weights.

    Their sum is a step's peak: the update comes after the rollout, but the KV cache stays.
    """
    parameters, text = shape.parameters, shape.text_parameters
    ranks = setting.world_size
    trained = parameters * setting.trained_share
    tokens, patches = setting.micro_batch_tokens, setting.groups_together * setting.picture_patches
    text_kept, vision_kept = saved_text_bytes(shape), saved_vision_bytes(shape)
    if setting.checkpointing:  # every layer's input, and one whole layer during its recomputation
        activations = tokens * (HALF * shape.hidden * shape.layers + text_kept)
        activations += patches * (HALF * shape.vision_hidden * shape.vision_layers + vision_kept)
    else:
        activations = tokens * text_kept * shape.layers + patches * vision_kept * shape.vision_layers
    rows = setting.prompts * setting.group * bool(setting.completion_tokens)
    cached = (setting.prompts * setting.prompt_tokens + rows * setting.completion_tokens) * bool(rows)
    return {
        "weights": FULL * parameters / (ranks if setting.zero_stage >= 3 else 1),
        "gradients": FULL * trained / (ranks if setting.zero_stage >= 2 else 1),
        "optimizer": 2 * FULL * trained / (ranks if setting.zero_stage >= 1 else 1),
        "weights cast by autocast": HALF * parameters,
        "reference": (HALF if setting.half_reference else FULL) * parameters * setting.has_reference,
        "sampler's weights": HALF * text * bool(rows),
        "KV cache": cached * shape.kv_bytes,
        "sampler's logits": 2 * FULL * rows * shape.vocab,
        "head's scratch": setting.logprob_bytes,
        "activations": activations,
        "overhead": OVERHEAD,
    }


def fits_unchecked(shape: ModelShape, setting: StepSetting, memory: float) -> bool:
    """Whether the step fits `memory` bytes of a GPU without checkpointing."""
    return sum(step_bytes(shape, replace(setting, checkpointing=False)).values()) <= USABLE * memory
