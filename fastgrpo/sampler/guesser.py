"""Guesses what a completion will go on with, from how often the run drew what behind the same last tokens.

Of every n-gram, n = 1…4, that a completion had drawn, two hash tables count what came next: how often anything did, and
the likeliest token with its count. Everything stays on the device. A guess may be wrong, by chance or because two
n-grams share a place: whoever asks for it checks it.
"""

import torch
from torch import Tensor

LONGEST = 4
"""Tokens of the longest n-gram."""
PLACES = 1 << 20
"""Of each table: 16 MB in all. Counts are halved when so many n-grams were counted as a quarter of that."""
MULTIPLIERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB, 0x52DB4D5C2F4F1A07, 0x6A09E667F3BCC909)
"""Odd numbers of 63 bits: the high bits of their products with tokens are a hash."""
TOKEN_BITS = 32


class Guesser:
    """Counts of n-grams, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.best = torch.zeros(PLACES + 1, dtype=torch.int64, device=device)
        """[PLACES + 1]: count << 32 | token, of the likeliest token behind an n-gram. Of all three tables the last
        place takes what does not count."""
        self.totals = torch.zeros(PLACES + 1, dtype=torch.int32, device=device)
        """Of an n-gram."""
        self.pairs = torch.zeros(PLACES + 1, dtype=torch.int32, device=device)
        """Of an n-gram with the token behind it."""
        self.multipliers = torch.tensor(MULTIPLIERS, device=device)
        self._counted = 0

    def guess(self, context: Tensor, count: int, least: float) -> Tensor:
        """[R, count] int64: the next tokens of each row; −1 from where their chance is under `least` or unknown.

        `context` [R, LONGEST]: the last tokens of each row, the last one first; −1 before its first.
        """
        guesses = []
        chance = torch.ones(len(context), device=context.device)
        for _ in range(count):
            places = _places(((context + 2) * self.multipliers[:LONGEST]).cumsum(dim=1))  # [R, n]
            best = self.best.take(places)
            known = (best > 0).sum(dim=1, keepdim=True)  # what is known of an n-gram is known of shorter ones
            longest = (known - 1).clamp_(min=0)
            best = best.gather(1, longest).squeeze(1)
            total = self.totals.take(places.gather(1, longest).squeeze(1))
            chance = chance * (best >> TOKEN_BITS) / (total + 0.5)  # what came once may as well come no more
            sure = (chance >= least) & (best > 0)
            chance = torch.where(sure, chance, -1.0)
            token = torch.where(sure, best & (1 << TOKEN_BITS) - 1, -1)
            guesses.append(token)
            if not token.is_cuda and not bool(sure.any()):
                guesses += [token] * (count - len(guesses))
                break
            context = torch.cat((token.unsqueeze(1), context[:, :-1]), dim=1)
        return torch.stack(guesses, dim=1) if guesses else context.new_empty(len(context), 0)

    def learn(self, drawn: Tensor, new: Tensor) -> None:
        """Counts new tokens.

        Args:
            drawn: [R, LONGEST + m] int64, each row's tokens in their order, the new ones last; −1 before its first.
            new: [R, m] bool, which of the last m count.
        """
        contexts = drawn[:, :-1].unfold(1, LONGEST, 1).flip(-1)  # [R, m, n], the last token first
        tokens = drawn[:, LONGEST:].unsqueeze(2)  # [R, m, 1]
        sums = ((contexts + 2) * self.multipliers[:LONGEST]).cumsum(dim=-1)
        counts = new.unsqueeze(2)
        places = torch.where(counts, _places(sums), PLACES).flatten()
        pairs = torch.where(counts, _places(sums + (tokens + 2) * self.multipliers[LONGEST]), PLACES).flatten()
        ones = torch.ones_like(places, dtype=torch.int32)
        self.totals.scatter_add_(0, places, ones)
        self.pairs.scatter_add_(0, pairs, ones)
        found = self.pairs.take(pairs).long() << TOKEN_BITS | tokens.expand(sums.shape).flatten()
        self.best.scatter_reduce_(0, places, found, "amax")

    def age(self, tokens: int) -> None:
        """Halves the counts once the tables fill; `tokens`: so many were counted since the last call."""
        self._counted += tokens * LONGEST
        if self._counted >= PLACES // 4:
            self._counted = 0
            for table in (self.totals, self.pairs):
                table >>= 1
            self.best.copy_((self.best >> TOKEN_BITS + 1 << TOKEN_BITS) | self.best & (1 << TOKEN_BITS) - 1)
            self.best.masked_fill_(self.best >> TOKEN_BITS == 0, 0)


def _places(hashes: Tensor) -> Tensor:
    """Where in the tables: some of the highest bits of each int64 hash."""
    return hashes >> 43 & PLACES - 1
