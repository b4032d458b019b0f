"""The sampler's state of a prompt and of each of its completions."""

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from fastgrpo.types import Completion, Prompt


def completion_seed(seed: int, step: int, row_id: int, index: int) -> int:
    """63-bit seed of one completion: the same on any number of ranks, in any batch, after any resume."""
    digest = hashlib.sha256(f"{seed}/{step}/{row_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(eq=False)
class Sequence:
    """One completion being sampled."""

    group: "PromptGroup"
    index: int
    """0..G-1 within its group."""
    seed: int
    pages: list[int] = field(default_factory=list)
    """Cache pages of its own tokens, enough for the longest completion; empty unless it runs."""
    row: int | None = None
    """Its row in the decode buffers, once it has one."""


@dataclass(eq=False)
class PromptGroup:
    """A prompt and its G completions."""

    prompt: Prompt
    sequences: list[Sequence] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    """Cache pages of the prompt, with one reference per unfinished sequence; empty before admission."""
    first_logits: Tensor | None = None
    """[1, V] logits from which every completion draws its first token; None before the prefill."""
    states: tuple[Tensor, ...] = ()
    """[1, …] each, from which every completion starts in layers of linear attention; see `CacheShape.state_sizes`."""
    unfinished: int = 0
    """Sequences that have neither ended nor been aborted."""
    completions: dict[int, Completion] = field(default_factory=dict)
    """Completions that have ended, by index."""

    @classmethod
    def of(cls, prompt: Prompt, size: int, *, seed: int, step: int) -> "PromptGroup":
        """A group of `size` sequences with seeds of their own."""
        group = cls(prompt, unfinished=size)
        group.sequences = [Sequence(group, i, completion_seed(seed, step, prompt.row_id, i)) for i in range(size)]
        return group

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.input_ids)
