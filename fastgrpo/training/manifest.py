"""What a checkpoint consists of, written last: so that a damaged one is known before anything is read from it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 26
"""Read and hashed at a time, several at once: gigabytes then take as long as reading them does."""


def write_manifest(folder: Path, run_id: str) -> None:
    """Lists the folder's files with their sizes and hashes, and the run they belong to."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    with ThreadPoolExecutor() as pool:
        entries = {name: {"bytes": path.stat().st_size, "xxh3": _hash(path, pool)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"run_id": run_id, "files": entries}, indent=1) + "\n")


def run_of(folder: Path) -> str | None:
    """The run that a checkpoint belongs to, where it says so."""
    run_id = (_read(folder) or {}).get("run_id")
    return run_id if isinstance(run_id, str) else None


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint; None where nothing is, and for one without a manifest, which cannot be told.

    Args:
        hashes: read every file whole; else only whether it is there, and its size.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = _read(folder)
    try:
        files = {str(name): (int(one["bytes"]), str(one["xxh3"])) for name, one in (manifest or {})["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{folder / MANIFEST} is damaged"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged: {path.stat().st_size:,} bytes of {size:,}"
    with ThreadPoolExecutor() as pool:
        for name, (_, expected) in files.items() if hashes else ():
            if _hash(folder / name, pool) != expected:
                return f"{folder / name} is damaged: its content has changed since it was saved"
    return None


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _hash(path: Path, pool: ThreadPoolExecutor) -> str:
    """The hash of its chunks' hashes."""

    def of_chunk(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return xxhash.xxh3_128_digest(file.read(CHUNK_BYTES))

    return str(xxhash.xxh3_128_hexdigest(b"".join(pool.map(of_chunk, _starts(path)))))


def _starts(path: Path) -> Iterator[int]:
    return iter(range(0, path.stat().st_size, CHUNK_BYTES))
