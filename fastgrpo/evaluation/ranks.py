"""The processes that share an evaluation's questions."""

from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; every one asks its share and knows all answers in the end."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def is_mine(self, row_id: int) -> bool:
        """Whether this process asks about a row: the same in every run on so many processes."""
        return row_id % self.count == self.index

    def gather(self, mine: list[Any]) -> list[Any]:
        """Every process's elements; a collective call."""
        return mine if self.count == 1 else gather_object(mine)
