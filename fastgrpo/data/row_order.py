"""The order of rows: which go into which rollout, on which rank."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler


class RolloutSampler(Sampler[list[int]]):
    """Batches of row indices: a rank's share of a rollout for each slice of it that is trained on.

    Where transformers counts several micro-batches a slice, its rows come in the first, and the others are empty.

    The order is a function of (seed, epoch) alone, so any rank, and any resumed run, sees the same one. Rows left over
    at the end of an epoch wait for the next epoch's order.

    Args:
        num_rows: rows in the data set.
        batch_size: prompts that one rank answers in one rollout.
        repeats: slices to train on per rollout.
        turns: micro-batches per slice.
        shuffle: a new order each epoch; else the rows' own.

    Raises:
        ValueError: the data set is smaller than one rollout.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        repeats: int,
        turns: int = 1,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if num_rows < batch_size * world_size:
            raise ValueError(
                f"the data set has {num_rows} rows, but one rollout takes {batch_size * world_size} prompts. Lower "
                "per_device_train_batch_size or gradient_accumulation_steps, or give more rows."
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.repeats = repeats
        self.turns = turns
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // (self.batch_size * self.world_size) * self.repeats * self.turns

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator) if self.shuffle else torch.arange(self.num_rows)
        for batch in order.split(self.batch_size * self.world_size):
            if len(batch) == self.batch_size * self.world_size:
                mine = batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()
                yield from [mine, *[[]] * (self.turns - 1)] * self.repeats


class RolloutLoader(DataLoader):
    """A `DataLoader` that tells its `RolloutSampler` the epoch."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, RolloutSampler)
        self.batch_sampler.set_epoch(epoch)
