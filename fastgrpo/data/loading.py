"""Data sets by name or path, read without filling memory."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash
from huggingface_hub.constants import HF_HUB_CACHE

from fastgrpo.data.mossbench import pictures_start, published_files, read_published
from fastgrpo.data.row_dataset import BATCH_ROWS, RowDataset, as_rows, undecoded
from fastgrpo.settings.given import given

try:
    import datasets
except ImportError:  # a machine that only measures may lack it: see `_read_without_datasets`
    datasets = None

logger = logging.getLogger(__name__)

ALIASES = {"SAT": ("array/SAT", "train"), "CV-Bench": ("nyu-visionx/CV-Bench", "test")}
"""Short name → hub id, and the split that "train" stands for."""

FILE_TYPES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}

READ_BYTES = 1 << 20
"""Bytes read from a parquet column at a time."""


def load_rows(
    name_or_path: str,
    *,
    split: str | Sequence[str] = "train",
    config_name: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    single_image_only: bool = False,
    picture_folders: Sequence[str] = (),
) -> RowDataset:
    """Opens a data set by path or hub id. Rows stay on disk, memory-mapped, whatever the size.

    Args:
        name_or_path: a .parquet, .jsonl, .json or .csv file; a folder of such files, or one written by
            `datasets.save_to_disk`; a hub id; or "SAT" or "CV-Bench".
        split: which split of a folder or hub data set; a single file has one only. Of several names, the first that
            there is; where there is none of them but a single split, that.
        config_name: configuration of a hub data set.
        max_samples: read the first rows alone; nothing behind them is read or downloaded.
        seed: seed of the option shuffle (SAT schema only).
        single_image_only: leave out rows with several images, after `max_samples` is counted, as the
            published SAT preparation does.
        picture_folders: where its pictures may lie beside its own folder and what the hub's client keeps.

    Raises:
        ValueError: no such file, hub data set, split or configuration; unreadable or empty data; columns of
            no known schema; `max_samples` below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples} must be at least 1, or None for all rows")
    for folder in picture_folders:
        if not Path(folder).expanduser().is_dir():
            raise ValueError(f"picture_folders={folder!r}: there is no such folder.")
    records, files = _load_records(name_or_path, split, config_name, max_samples)
    if single_image_only:
        records = _drop_multi_image(records)
    rows = as_rows(records, seed, name=f"dataset_name={name_or_path!r}")
    path = Path(name_or_path).expanduser()
    own = [path] if path.is_dir() else [pictures_start(path)] if path.is_file() else []
    rows.folders = (*own, *(Path(folder).expanduser() for folder in picture_folders), *_caches())
    rows.files = frozenset(map(_identity, files))
    return rows


def _caches() -> list[Path]:
    """Where pictures of data sets on the hub lie once they are downloaded."""
    return [] if datasets is None else [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]


def _identity(file: str) -> str:
    """A name for a file's content: of a local one its size and a hash of both ends, else its address."""
    path = Path(file)
    if not path.is_file():
        return file
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest = xxhash.xxh3_128(stream.read(READ_BYTES))
        stream.seek(max(0, size - READ_BYTES))
        digest.update(stream.read(READ_BYTES))
    return f"{size}:{digest.hexdigest()}"


def _load_records(
    name_or_path: str, split: str | Sequence[str], config_name: str | None, max_samples: int | None
) -> tuple[Any, list[str]]:
    """The records, and the files that they are read from."""
    path = Path(name_or_path).expanduser()
    if published := published_files(path):
        return read_published(published)[:max_samples], list(map(str, published))
    if datasets is None:
        return _read_without_datasets(name_or_path, path, max_samples), [name_or_path]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with given(f"dataset_name={name_or_path!r} cannot be read", "Write it anew with `save_to_disk`."):
            saved = datasets.load_from_disk(str(path))
        return _of_saved(saved, name_or_path, split, max_samples)
    if split == "train" and name_or_path in ALIASES and not path.exists():
        split = ALIASES[name_or_path][1]
    arguments = _builder_arguments(name_or_path, path, split if isinstance(split, str) else split[0], config_name)
    try:
        builder = datasets.load_dataset_builder(**arguments)
    except Exception as error:  # no connection, offline mode, unknown id or configuration, empty folder, …
        problem = "is neither a local file or folder nor reachable on the hub"
        problem = "cannot be read" if path.exists() else problem
        raise ValueError(f"dataset_name={name_or_path!r} {problem}: {_one_line(error)}") from error
    splits = {str(name): [str(file) for file in files] for name, files in builder.config.data_files.items()}
    split = _pick_split(name_or_path, split, splits)
    try:
        # The builder's cache folder is named by a hash of the files' versions: a changed file is read anew.
        if all(file.endswith(".parquet") for file in splits[split]):
            return _read_parquet(splits[split], max_samples, version=builder.cache_dir), splits[split]
        if max_samples is not None:
            return _read_first(arguments, split, max_samples, version=builder.cache_dir), splits[split]
        builder.download_and_prepare()
        return builder.as_dataset(split=split), splits[split]
    except Exception as error:  # Arrow, JSON and CSV parsers, and the hub once more
        raise ValueError(f"dataset_name={name_or_path!r} cannot be read: {_one_line(error)}") from error


def _read_without_datasets(name_or_path: str, path: Path, max_samples: int | None) -> list[dict[str, Any]]:
    """A parquet file's rows, held in memory: all that can be read where the `datasets` package is missing."""
    if path.suffix != ".parquet" or not path.is_file():
        raise ValueError(
            f"dataset_name={name_or_path!r} needs the datasets package, which is not installed: pip install datasets. "
            "Without it only a local .parquet file can be read."
        )
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows[:max_samples]


def _builder_arguments(name_or_path: str, path: Path, split: str, config_name: str | None) -> dict[str, Any]:
    """What `datasets.load_dataset_builder` is asked for: a file, a folder or a hub id."""
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            known = ", ".join(FILE_TYPES)
            raise ValueError(f"dataset_name={name_or_path!r} has no known file type: use {known}")
        if not path.stat().st_size:
            raise ValueError(f"dataset_name={name_or_path!r} has no rows: the file is empty")
        return {"path": FILE_TYPES[path.suffix], "data_files": {split: glob.escape(str(path))}}
    if path.is_dir():
        return {"path": str(path.absolute()), "name": config_name}  # "." has no name that `datasets` could take
    if path.suffix in FILE_TYPES or path.is_absolute() or name_or_path.startswith((".", "~")):
        raise ValueError(f"dataset_name={name_or_path!r}: no such file or folder ({path.absolute()})")
    hub_id, _ = ALIASES.get(name_or_path, (name_or_path, None))
    return {"path": hub_id, "name": config_name}


def _one_line(error: BaseException) -> str:
    """The cause's message on one line: `datasets` wraps parser errors in a general one."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _pick_split(name_or_path: str, wanted: str | Sequence[str], splits: Collection[str]) -> str:
    if isinstance(wanted, str):
        wanted = (wanted,)
    elif len(splits) == 1:
        return next(iter(splits))
    found = next((name for name in wanted if name in splits), None)
    if found is None:
        raise ValueError(f"dataset_name={name_or_path!r} has no split {wanted[0]!r}, only {', '.join(splits)}")
    return found


def _of_saved(
    saved: Any, name_or_path: str, split: str | Sequence[str], max_samples: int | None
) -> tuple[datasets.Dataset, list[str]]:
    if isinstance(saved, dict):
        saved = saved[_pick_split(name_or_path, split, saved)]
    files = [entry["filename"] for entry in saved.cache_files]
    return saved if max_samples is None else saved.select(range(min(max_samples, len(saved)))), files


def _read_parquet(files: list[str], max_samples: int | None, version: str) -> datasets.Dataset:
    """Rows of parquet files as a memory-mapped Arrow file in the `datasets` cache.

    `datasets` itself reads a row group at once, and published files of gigabytes are one row group.
    """
    if max_samples is None:
        files = datasets.DownloadManager().download(files)
    # A tuple: `datasets` takes a list for shards and calls the generator once per element.
    arguments = {"files": tuple(files), "max_samples": max_samples, "version": version}
    return _to_disk(_iterate_parquet, arguments, _features(files[0]))


def _iterate_parquet(files: tuple[str, ...], max_samples: int | None, version: str) -> Iterator[dict[str, Any]]:
    """The files' first rows, in order; `version` only enters the cache's key."""
    count = 0
    for file in files:
        features = _features(file)
        with fsspec.open(file, "rb") as stream:
            reader = pyarrow.parquet.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
            for batch in reader.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                for record in batch.to_pylist():
                    yield features.decode_example(record)
                    count += 1
                    if count == max_samples:
                        return


def _features(file: str) -> datasets.Features:
    with fsspec.open(file, "rb") as stream:
        schema = pyarrow.parquet.read_schema(stream)
    return datasets.Features(undecoded(datasets.Features.from_arrow_schema(schema)))


def _read_first(arguments: dict[str, Any], split: str, max_samples: int, version: str) -> datasets.Dataset:
    """The first rows of any other format as a memory-mapped Arrow file in the `datasets` cache."""
    key = {"arguments": arguments, "split": split, "max_samples": max_samples, "version": version}
    return _to_disk(_iterate_first, key)


def _iterate_first(arguments: dict[str, Any], split: str, max_samples: int, version: str) -> Iterator[dict[str, Any]]:
    stream = datasets.load_dataset_builder(**arguments).as_streaming_dataset(split=split)
    yield from (stream.decode(False) if stream.features else stream).take(max_samples)


def _to_disk(
    generator: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    features: datasets.Features | None = None,
) -> datasets.Dataset:
    """The generator's rows, written once per set of arguments."""
    if next(generator(**arguments | {"max_samples": 1}), None) is None:
        return datasets.Dataset.from_list([])  # `from_generator` fails on no rows, with a cryptic message
    return datasets.Dataset.from_generator(generator, features=features, gen_kwargs=arguments)


def _drop_multi_image(records: Any) -> Any:
    if isinstance(records, list):  # read without `datasets`
        return [row for row in records if len(row.get("image_bytes") or row.get("images") or ()) <= 1]
    for column in ("image_bytes", "images"):
        if column not in records.column_names:
            continue
        images = records.select_columns([column]).with_format("arrow")[:][column]
        counts = pyarrow.compute.list_value_length(images).to_pylist()
        kept = [index for index, count in enumerate(counts) if (count or 0) <= 1]
        logger.info("left out %d of %d rows: several images", len(counts) - len(kept), len(counts))
        return records.select(kept)
    return records
