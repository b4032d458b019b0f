"""The published benchmarks by name: where each lies on the hub, and its rows from there, a file or a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from fastgrpo.data.images import Folders
from fastgrpo.data.loading import load_rows
from fastgrpo.data.row_dataset import SCHEMAS, RowDataset


@dataclass(frozen=True)
class Benchmark:
    """A data set on the hub and how it is laid out there."""

    title: str
    hub_id: str
    schema: str
    """A key of `SCHEMAS`."""
    splits: tuple[str, ...]
    """Those with answers, the one that scores are published for first."""
    configs: tuple[str, ...] = ()
    """The configurations (elsewhere: subfolders) that make it up; empty where there is one."""


BENCHMARKS = {
    "cvbench": Benchmark("CV-Bench", "nyu-visionx/CV-Bench", "cvbench", ("test",)),
    "sat": Benchmark("SAT", "array/SAT", "sat", ("test", "validation", "val")),
    "blink": Benchmark(
        "BLINK", "BLINK-Benchmark/BLINK", "blink", ("val", "validation"), ("Relative_Depth", "Spatial_Relation")
    ),
    "vsr": Benchmark("VSR", "cambridgeltl/vsr_random", "vsr", ("test",)),
    "mossbench": Benchmark("MOSSBench", "AIcell/MOSSBench", "mossbench", ("train",), ("oversensitivity", "contrast")),
}


def load_benchmark(
    name: str,
    data: str | None = None,
    *,
    split: str | None = None,
    pictures: Path | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> RowDataset:
    """Opens a benchmark's rows.

    Args:
        name: a key of `BENCHMARKS`.
        data: a file, a folder or a hub id to read it from; None: where it is published.
        split: another than the one that scores are published for.
        pictures: where pictures lie; None: beside the data.
        max_samples: the first rows alone (of each configuration).
        seed: of the option shuffle (SAT).

    Raises:
        ValueError: as `load_rows`, or rows of another schema.
    """
    benchmark = BENCHMARKS[name]
    wanted = split or benchmark.splits
    parts = [
        load_rows(place, split=wanted, config_name=config, max_samples=max_samples, seed=seed)
        for place, config in _places(benchmark, data)
    ]
    for part in parts:
        if part.schema != benchmark.schema:
            columns = ", ".join(sorted(SCHEMAS[benchmark.schema]))
            raise ValueError(
                f"--benchmark {name}: {data} has rows of the schema {part.schema!r}; wanted the columns {columns}"
            )
    rows = parts[0] if len(parts) == 1 else _joined(parts)
    rows.folders = with_pictures(pictures, rows.folders)
    return rows


def with_pictures(pictures: Path | None, folders: Folders) -> Folders:
    """Where pictures may lie, a folder that the user named before the data set's own."""
    return folders if pictures is None else (pictures, *(folders or ()))


def _places(benchmark: Benchmark, data: str | None) -> list[tuple[str, str | None]]:
    """Names or paths, each with its configuration."""
    place = data or benchmark.hub_id
    folder = Path(place).expanduser()
    if not benchmark.configs or folder.is_file():
        return [(place, None)]
    if not folder.is_dir():
        return [(place, config) for config in benchmark.configs]
    return [(str(folder / config), None) for config in benchmark.configs if (folder / config).is_dir()] or [
        (place, None)
    ]


def _joined(parts: Sequence[RowDataset]) -> RowDataset:
    """The rows of all, one after the other."""
    first = parts[0]
    records: Any = ConcatDataset([part.records for part in parts])
    files = frozenset[str]().union(*(part.files for part in parts))
    return RowDataset(records, first.schema, first.seed, folders=_all_folders(parts), files=files)


def _all_folders(parts: Sequence[RowDataset]) -> Folders:
    return tuple(dict.fromkeys(folder for part in parts for folder in part.folders or ()))
