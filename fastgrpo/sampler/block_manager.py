"""Allocates pages of the KV cache, with reference counts."""

from collections import deque
from collections.abc import Sequence


class BlockManager:
    """Reference-counted pages. A prompt's pages have one reference for each sequence that reads them."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.references = [0] * num_pages
        self._free = deque(range(num_pages))

    def pages_for(self, tokens: int) -> int:
        """How many pages hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_pages - self.free

    def allocate(self, count: int, references: int = 1, *, last: bool = False) -> list[int]:
        """Allocates `count` pages, to be released `references` times. The caller checks that so many are free.

        Until a page is released, pages come in ascending order, from the start or (`last`) the end of the free ones.
        """
        assert references > 0
        assert count <= self.free, f"{count} pages wanted, {self.free} are free"
        pages = [self._free.pop() if last else self._free.popleft() for _ in range(count)]
        if last:
            pages.reverse()
        for page in pages:
            self.references[page] = references
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page; pages without references become free."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} is released but nobody holds it"
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)
