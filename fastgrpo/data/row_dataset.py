"""The map-style data set that training and evaluation read: raw records and the schema of their columns."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Self

from torch.utils.data import Dataset

from fastgrpo.data import blink, cvbench, mossbench, sat, vsr
from fastgrpo.data.blink import convert_blink
from fastgrpo.data.chat import IMAGE_COLUMNS, convert_chat
from fastgrpo.data.cvbench import convert_cvbench
from fastgrpo.data.images import Folders
from fastgrpo.data.mossbench import convert_mossbench
from fastgrpo.data.rows import Row
from fastgrpo.data.sat import convert_sat
from fastgrpo.data.vsr import convert_vsr
from fastgrpo.scoring.golds import check_gold

try:
    import datasets
except ImportError:  # a machine that only measures may lack it
    datasets = None

logger = logging.getLogger(__name__)

SCHEMAS = {
    "sat": sat.REQUIRED_COLUMNS,
    "cvbench": cvbench.REQUIRED_COLUMNS,
    "blink": blink.REQUIRED_COLUMNS,
    "vsr": vsr.REQUIRED_COLUMNS,
    "mossbench": mossbench.REQUIRED_COLUMNS,
    "chat": frozenset({"prompt"}),
    "messages": frozenset({"messages"}),
    "question": frozenset({"question", "solution"}),
    "problem": frozenset({"problem", "solution"}),
    "answer": frozenset({"question", "answer"}),
}
"""Schema → the columns that show it; the first that fits counts."""

CONVERTERS = {"cvbench": convert_cvbench, "blink": convert_blink, "vsr": convert_vsr, "mossbench": convert_mossbench}
"""Schemas of published benchmarks, whose rows must have pictures."""

BATCH_ROWS = 16
"""Rows decoded from a parquet file at a time: pictures make rows of 100 KB and more."""


class Rows:
    """Raw records of one schema, pictures still encoded.

    Args:
        records: a HF data set, any sequence-like object of dicts, or a stream of dicts.
        schema: a key of `SCHEMAS`.
        seed: seed of the option shuffle (SAT schema only).
        folders: where pictures may lie, and relative paths of them start; None: anywhere.
        files: what the rows were read from, each file by its content or address; empty for rows in memory.
    """

    def __init__(
        self,
        records: Any,
        schema: str,
        seed: int = 0,
        *,
        folders: Folders = None,
        files: frozenset[str] = frozenset(),
    ) -> None:
        self.records = records
        self.schema = schema
        self.seed = seed
        self.folders = folders
        self.files = files
        self.checks_golds = False

    def with_checked_golds(self) -> Self:
        """The same rows, but `convert` raises a `RowError` where no answer can match `solution` or `choices`."""
        checked = copy.copy(self)
        checked.checks_golds = True
        return checked

    def convert(self, row_id: int, raw: dict[str, Any]) -> Row:
        """Decodes and converts one record.

        Raises:
            RowError: the record is bad, with the reason.
        """
        if self.schema == "sat":
            return convert_sat(raw, row_id, self.seed, self.folders)
        if self.schema in CONVERTERS:
            return CONVERTERS[self.schema](raw, row_id, self.folders)
        row = convert_chat(raw, row_id, self.folders)
        if self.checks_golds:
            check_gold(row.columns.get("solution"), row.columns.get("choices"))
        return row


class RowDataset(Rows, Dataset[tuple[int, dict[str, Any]]]):
    """A map-style data set: `dataset[i]` is (i, record)."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.records[index]


def as_rows(dataset: Any, seed: int = 0, *, name: str = "the data set") -> RowDataset:
    """Wraps a HF data set, a list of dicts, or a torch map-style data set of dicts.

    Args:
        dataset: what a user handed to the trainer; a `RowDataset` is returned as it is.
        seed: seed of the option shuffle (SAT schema only).
        name: what error messages call it.

    Raises:
        TypeError: a dict of several sets.
        ValueError: no length or no rows, records that are no dicts, or columns of no known schema.
    """
    if isinstance(dataset, RowDataset):
        return dataset
    if isinstance(dataset, dict):
        raise TypeError(
            f"`{name}` must be a `Dataset` or `IterableDataset`, no dict of splits {sorted(dataset)}: pass one of them"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{name} is a {type(dataset).__name__} without length or index: pass a map-style data set")
    if not len(dataset):
        raise ValueError(f"{name} has no rows")
    if datasets is not None and isinstance(dataset, datasets.Dataset):
        dataset = _without_decoding(dataset)
        columns = dataset.column_names
    elif isinstance(dataset[0], dict):
        columns = list(dataset[0])
    else:
        raise ValueError(f"{name} holds {type(dataset[0]).__name__} records; wanted dicts")
    rows = RowDataset(dataset, detect_schema(columns, name), seed)
    if rows.schema not in ("sat", *CONVERTERS):
        _warn_of_missing_pictures(dataset, [column for column in IMAGE_COLUMNS if column in columns], name)
    return rows


def _warn_of_missing_pictures(dataset: Any, columns: Sequence[str], name: str) -> None:
    """Reports rows whose picture is null: they may be text-only by intent, or have lost it."""
    missing = _rows_without(dataset, columns) if columns else []
    if missing:
        logger.warning(
            "%s: %d of %d rows have no picture in %s, the first is row %d. They are asked without one; leave them out "
            "if it was lost.",
            name,
            len(missing),
            len(dataset),
            " or ".join(columns),
            missing[0],
        )


def _rows_without(dataset: Any, columns: Sequence[str]) -> list[int]:
    """Indices of rows where all of the columns are null. A torch data set is not read ahead for this."""
    if isinstance(dataset, list | tuple):
        return [i for i, record in enumerate(dataset) if all(record.get(column) is None for column in columns)]
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return []
    if not all(dataset.data.column(column).null_count for column in columns):
        return []
    missing: list[int] = []
    start = 0
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH_ROWS):
        nulls = [batch[column].is_null().to_pylist() for column in columns]
        missing += [start + i for i, absent in enumerate(zip(*nulls, strict=True)) if all(absent)]
        start += batch.num_rows
    return missing


def warn_of_shared_rows(training: Rows, held_out: Rows) -> None:
    """Warns if both sets come from the same file or object."""
    if training.records is held_out.records or training.files & held_out.files:
        logger.warning(
            "the rows to train on and the held-out rows come from the same file: scores on them tell what was "
            "memorised. Hold other rows out."
        )


def detect_schema(columns: Sequence[str], name: str) -> str:
    for schema, required in SCHEMAS.items():
        if required <= set(columns):
            return schema
    wanted = "; ".join(f"{schema}: {', '.join(sorted(required))}" for schema, required in SCHEMAS.items())
    raise ValueError(f"{name} has the columns {', '.join(columns)}, which fit no schema. Wanted, {wanted}")


def _without_decoding(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rows with pictures left as bytes, so that a bad one is found where it can be reported."""
    for name, feature in dataset.features.items():
        if (encoded := undecoded(feature)) != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def undecoded(feature: Any) -> Any:
    """A column's feature with its pictures left as bytes, however deep they lie."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: undecoded(value) for name, value in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=undecoded(feature.feature))
    return feature
