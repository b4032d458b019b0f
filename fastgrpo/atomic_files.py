"""Files and folders that are whole or absent: written aside, synced to disk, renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary file beside `path`, syncs it and renames it: `path` is never half written."""
    aside = path.with_name(f".{path.name}.part")
    remove(aside)  # what a killed write left; a link would lead elsewhere
    write(aside)
    _sync(aside)
    aside.replace(path)


def publish(aside: Path, final: Path) -> None:
    """Syncs the folder `aside` and everything in it to disk, then renames it to `final`, replacing that."""
    for path in sorted(aside.rglob("*")):
        _sync(path)
    _sync(aside)
    replaced = aside.with_name(f"{aside.name}.replaced")
    if final.exists():
        final.rename(replaced)  # removing it takes time, in which a kill would leave half of it
    aside.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, but not what that leads to; nothing may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
