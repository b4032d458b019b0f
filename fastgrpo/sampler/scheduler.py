"""Decides which sequences run: first come, first served, within the limits of rows and cache pages.

A sequence is admitted with pages for the longest possible completion. So every running sequence can finish: there is no
preemption, and nothing is computed twice. The price: pages reserved for completions that end early stay unused, so
fewer rows run. If a group does not fit whole, part of it is admitted.
"""

from collections import deque

from fastgrpo.sampler.block_manager import BlockManager
from fastgrpo.sampler.sequence import PromptGroup, Sequence


class Scheduler:
    """Admits waiting sequences and releases the pages of those that end."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_rows: int,
        max_groups: int,
        max_new_tokens: int,
        short_of_memory: bool = False,
    ) -> None:
        """At most `max_rows` sequences of at most `max_groups` prompts run at a time.

        `short_of_memory`: the cache's size was limited by free memory, not by a setting.
        """
        self.blocks = blocks
        self.short_of_memory = short_of_memory
        self.max_rows = max_rows
        self.max_groups = max_groups
        # The last token drawn is never attended to, so it needs no slot.
        self.suffix_pages = blocks.pages_for(max_new_tokens - 1)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission, so a prompt's sequences are adjacent."""

    def add(self, group: PromptGroup) -> None:
        """Puts a group's sequences at the end of the queue.

        Raises:
            ValueError: not even one of its sequences fits the cache.
        """
        needed = self.blocks.pages_for(group.length) + self.suffix_pages
        if needed > self.blocks.num_pages:
            size = self.blocks.page_size
            room = self.blocks.num_pages * size
            row = (
                f"row {group.prompt.row_id} has a prompt of {group.length} tokens and needs {needed * size} with its "
                "completion"
            )
            if self.short_of_memory:
                raise ValueError(
                    f"the GPU has free memory for a KV cache of {room} tokens: {row}. Lower max_completion_length, "
                    "max_pixels (smaller pictures) or vision_cache_bytes, or free memory: train fewer parameters, or "
                    "end other processes on this GPU."
                )
            raise ValueError(
                f"max_cache_tokens={room} is too small: {row}. Raise it (of a run: sampler_max_cache_tokens), or "
                "lower the prompt or completion length."
            )
        self.waiting.extend(group.sequences)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[Sequence]:
        """Moves sequences that now fit to `running`, in the queue's order, and allocates their pages."""
        admitted: list[Sequence] = []
        groups = {id(sequence.group) for sequence in self.running}
        while self.waiting and self._fits(self.waiting[0].group, groups):
            sequence = self.waiting.popleft()
            group = sequence.group
            if not group.pages:
                count = self.blocks.pages_for(group.length)
                group.pages = self.blocks.allocate(count, references=group.unfinished, last=True)
            # From the other end: adjacent sequences get adjacent pages, which a CPU reads without copying.
            sequence.pages = self.blocks.allocate(self.suffix_pages)
            groups.add(id(group))
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def finish(self, sequence: Sequence) -> None:
        """Removes a running or waiting sequence that has ended or was aborted, and releases its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.pages)
        self.blocks.release(sequence.group.pages)
        sequence.pages = []
        sequence.group.unfinished -= 1

    def _fits(self, group: PromptGroup, groups: set[int]) -> bool:
        """Whether one more sequence of `group` may run beside those of `groups`."""
        if len(self.running) >= self.max_rows or len(groups | {id(group)}) > self.max_groups:
            return False
        prompt_pages = 0 if group.pages else self.blocks.pages_for(group.length)
        return prompt_pages + self.suffix_pages <= self.blocks.free
