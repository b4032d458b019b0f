"""A disk that is full, at many sizes: one line, nothing lost, and the next start goes on to the same bits."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from campaign import LAST, RESULTS, Runs, content, last_lines, report

FILE_LIMITS = [0, 100, 1_000, 4_000, 16_000, 64_000, 256_000, 500_000, 800_000, 1_000_000, 1_200_000]
"""Bytes a file may have."""
DISKS = [16, 64, 256, 1024, 2048, 3072, 4096, 6144, 8192, 12_288]
"""KiB of a file system in memory, where one may be mounted."""


def after_a_full_disk(runs: Runs, name: str, expected: object, code: int, said: str) -> str:
    """How the run ended, and goes on with room enough."""
    if code not in (0, 2) or "Traceback" in said or len(last_lines(said)) != (code != 0):
        return f"exit code {code}: {said[-600:]}"
    out = runs.folder / name
    saved = len(list(out.glob("checkpoint-*")))
    again, more = runs.finish(name, *LAST)
    moved = any(out.glob("previous-*/metrics.jsonl"))  # steps before the first checkpoint
    if again != 0 or (moved and saved) or content(out) != expected:
        return f"did not go on: {more[-600:]}"
    return f"{'one line' if code else 'it fits'}, {saved} checkpoints, goes on"


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """Mounts a file system of so many KiB; whether that is allowed here."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "campaign", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_full_disks(tiny_model_dir: Path, sat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path / "runs", tiny_model_dir, sat_file, "--max_steps", "3")
    expected = content(runs.succeed("whole"))
    table = {}
    for limit in FILE_LIMITS if RESULTS else [500_000]:
        name = f"files of {limit:,} bytes"
        limited = (resource.RLIMIT_FSIZE, (limit, limit))
        code, said = runs.finish(name, *LAST, before=lambda limited=limited: resource.setrlimit(*limited))
        table[name] = after_a_full_disk(runs, name, expected, code, said)
    for kib in DISKS if RESULTS else []:
        name = f"a disk of {kib:,} KiB"
        with small_disk(runs.folder / name, kib) as mounted:
            if not mounted:
                table[name] = "not mounted: not allowed here"
                continue
            code, said = runs.finish(name, *LAST)
            subprocess.run(["mount", "-o", "remount,size=1g", str(runs.folder / name)], check=True)
            table[name] = after_a_full_disk(runs, name, expected, code, said)
    report(capsys, "full disk", table, sizes=len(table))
    assert all(row.endswith((", goes on", "not allowed here")) for row in table.values()), table
