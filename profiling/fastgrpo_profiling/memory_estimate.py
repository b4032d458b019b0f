"""How much memory a training step needs, counted from shapes before anything is allocated.

Counted are the tensors that grow with the model or the batch. What an allocator rounds up and libraries keep for
themselves is in `OVERHEAD`.
"""

from dataclasses import dataclass

from fastgrpo_profiling.roofline import ModelShape

OVERHEAD = 1.5e9
"""Bytes of the CUDA context, of library workspaces and of fragments, beside the tensors counted here."""
HALF, FULL = 2, 4
"""Bytes of a bfloat16 and of a float32 value."""


@dataclass(frozen=True)
class StepSetting:
    """What of a run decides its memory. Lengths are upper bounds."""

    prompts: int
    """Of a rollout."""
    group: int
    prompt_tokens: int
    completion_tokens: int
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
    """Of the parameters, how many have gradients and optimizer states."""
    world_size: int = 1
    zero_stage: int = 0
    """DeepSpeed's; from 1 the optimizer's states are divided among ranks, from 2 gradients, from 3 weights."""

    @property
    def group_tokens(self) -> int:
        """Of a prompt with all its completions."""
        return self.prompt_tokens + self.group * self.completion_tokens

    @property
    def groups_together(self) -> int:
        """Whole groups in a micro-batch; 1 where a group is cut."""
        return min(max(self.token_budget // self.group_tokens, 1), self.prompts)

    @property
    def micro_batch_tokens(self) -> int:
        """Of the largest micro-batch. A prompt with one completion is never cut."""
        most = max(self.token_budget, self.prompt_tokens + self.completion_tokens)
        return min(self.groups_together * self.group_tokens, most)


def saved_text_bytes(shape: ModelShape) -> int:
    """Bytes that one decoder layer keeps of a token for its backward pass, elementwise work fused, in half precision.

    Kept are both residuals and both normalised inputs (4 H), queries, keys, values and the attention's output
    (2 Hq D + 2 Hkv D), gate, up and their product (3 I). Eager autocast keeps half as much again.
    """
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return HALF * (4 * shape.hidden + attention + 3 * shape.intermediate)


def saved_vision_bytes(shape: ModelShape) -> int:
    """The same of a patch and one vision block: 4 W of residuals and norms, 4 W of attention, 2 I of the MLP."""
    if not shape.vision_layers:
        return 0
    inner = shape.vision_mlp_weights // (2 * shape.vision_hidden)
    return HALF * (8 * shape.vision_hidden + 2 * inner)


def step_bytes(shape: ModelShape, setting: StepSetting) -> dict[str, float]:
    """Bytes by what they are for, of a rank on a GPU that trains under bfloat16 autocast with float32 weights.

    They add up to a step's peak: the update comes after the rollout, but the KV cache stays.
    """
    parameters, text = shape.parameters, shape.text_parameters
    ranks = setting.world_size
    trained = parameters * setting.trained_share
    tokens, patches = setting.micro_batch_tokens, setting.groups_together * setting.picture_patches
    text_kept, vision_kept = saved_text_bytes(shape), saved_vision_bytes(shape)
    if setting.checkpointing:  # every layer's input, and one layer in full while it is computed again
        activations = tokens * (HALF * shape.hidden * shape.layers + text_kept)
        activations += patches * (HALF * shape.vision_hidden * shape.vision_layers + vision_kept)
    else:
        activations = tokens * text_kept * shape.layers + patches * vision_kept * shape.vision_layers
    rows = setting.prompts * setting.group
    cached = setting.prompts * setting.prompt_tokens + rows * setting.completion_tokens
    return {
        "weights": FULL * parameters / (ranks if setting.zero_stage >= 3 else 1),
        "gradients": FULL * trained / (ranks if setting.zero_stage >= 2 else 1),
        "optimizer": 2 * FULL * trained / (ranks if setting.zero_stage >= 1 else 1),
        "weights cast by autocast": HALF * parameters,
        "reference": (HALF if setting.half_reference else FULL) * parameters * setting.has_reference,
        "sampler's weights": HALF * text,
        "KV cache": cached * shape.kv_bytes,
        "sampler's logits": 2 * FULL * rows * shape.vocab,
        "head's scratch": setting.logprob_bytes,
        "activations": activations,
        "overhead": OVERHEAD,
    }
