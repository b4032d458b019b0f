"""Rows that come as a stream: read in order, without length or index, once for each pass over the data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from fastgrpo.data.row_dataset import RowDataset, Rows, as_rows, detect_schema

try:
    import datasets
except ImportError:  # a machine that only measures may lack it
    datasets = None

logger = logging.getLogger(__name__)


class RowStream(Rows):
    """A stream of raw records, which can be read again from its start."""

    def read(self, *, shuffle: bool = False, seed: int = 0, passes_before: int = 0) -> Iterator[dict[str, Any]]:
        """One pass over the records; shuffled through a buffer, each pass in another order."""
        records = self.records
        if shuffle and datasets is not None and isinstance(records, datasets.IterableDataset):
            records = records.shuffle(seed=seed)
            records.set_epoch(passes_before)
        return iter(records)


def is_stream(dataset: Any) -> bool:
    """Whether a data set has neither length nor index, but can be read through."""
    return hasattr(dataset, "__iter__") and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def as_stream(dataset: Any, seed: int = 0, *, name: str = "the data set") -> RowStream:
    """Wraps a HF or torch iterable data set of dicts.

    Args:
        seed, name: as `as_rows`.

    Raises:
        ValueError: it can be read only once, has no rows, or columns of no known schema.
    """
    if hasattr(dataset, "__next__"):
        raise ValueError(f"{name} is a {type(dataset).__name__}, which can be read only once: pass a data set")
    records = dataset
    if datasets is not None and isinstance(dataset, datasets.IterableDataset) and dataset.features:
        records = dataset.decode(False)  # a bad picture is then found where it can be reported
    first = next(iter(records), None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    if not isinstance(first, dict):
        raise ValueError(f"{name} holds {type(first).__name__} records; wanted dicts")
    return RowStream(records, detect_schema(list(first), name), seed)


def read_whole(dataset: Any, seed: int = 0, *, name: str = "the data set") -> RowDataset:
    """A finite stream's rows in memory, pictures encoded: evaluation asks all of them each time."""
    stream = as_stream(dataset, seed, name=name)
    return as_rows(list(stream.read()), seed, name=name)


class StreamBatches(IterableDataset[list[tuple[int, dict[str, Any]]]]):
    """What `RolloutSampler` is for indexed rows: a rank's rows of a rollout for each slice of it.

    It goes on without end, from pass to pass; rows are numbered as they come. Every rank reads the whole stream and
    keeps its share.

    Args:
        batch_size: prompts that one rank answers in one rollout.
        repeats, turns: as there.
        shuffle: through a buffer, where the stream can do so (a HF one); else the rows' own order.
    """

    def __init__(
        self,
        rows: RowStream,
        batch_size: int,
        *,
        repeats: int,
        turns: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.repeats = repeats
        self.turns = turns
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        numbered = enumerate(self._passes())
        first = self.rank * self.batch_size
        while batch := list(itertools.islice(numbered, self.batch_size * self.world_size)):
            mine: list[tuple[int, dict[str, Any]]] = batch[first : first + self.batch_size]
            empty: list[list[tuple[int, dict[str, Any]]]] = [[]] * (self.turns - 1)
            yield from [mine, *empty] * self.repeats

    def _passes(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            count = 0
            for record in self.rows.read(shuffle=self.shuffle, seed=self.seed, passes_before=number):
                count += 1
                yield record
            if not count:
                raise ValueError("the stream has no more rows: it cannot be read a second time")


def stream_loader(batches: StreamBatches, collate: Any, num_workers: int, **options: Any) -> DataLoader:
    """A loader of prompts; more than one process would each read the stream, so at most one prepares prompts ahead."""
    if num_workers > 1:
        logger.info("dataloader_num_workers: a stream is read by one process.")
    return DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=min(num_workers, 1), **options)
