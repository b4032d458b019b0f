"""Which sequences run: first come, first served, as far as rows and cache pages go.

A sequence is admitted with pages for the longest completion it may become. So whatever runs can always finish: there is
no preemption, and no sequence is ever computed twice. The price is rows: pages wait unused behind completions that end
early. A group is admitted in part where all of it does not fit.
"""

from collections import deque

from fastgrpo.sampler.block_manager import BlockManager
from fastgrpo.sampler.sequence import PromptGroup, Sequence


class Scheduler:
    """Admits waiting sequences and takes back the pages of those that end."""

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

        `short_of_memory`: the cache is as small as it is for want of memory, not because a setting says so.
        """
        self.blocks = blocks
        self.short_of_memory = short_of_memory
        self.max_rows = max_rows
        self.max_groups = max_groups
        # The last token drawn is never read back, so it needs no place.
        self.suffix_pages = blocks.pages_for(max_new_tokens - 1)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission, hence the sequences of a prompt side by side."""

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
        """Moves to `running` what now fits, with pages; the queue's order is kept."""
        admitted: list[Sequence] = []
        groups = {id(sequence.group) for sequence in self.running}
        while self.waiting and self._fits(self.waiting[0].group, groups):
            sequence = self.waiting.popleft()
            group = sequence.group
            if not group.pages:
                count = self.blocks.pages_for(group.length)
                group.pages = self.blocks.allocate(count, references=group.unfinished, last=True)
            # From the other end: sequences side by side get pages side by side, which a CPU reads in place.
            sequence.pages = self.blocks.allocate(self.suffix_pages)
            groups.add(id(group))
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def finish(self, sequence: Sequence) -> None:
        """Takes back a sequence's pages; it has ended or is aborted, running or still waiting."""
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
