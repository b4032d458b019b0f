"""What commands print while they work: lines on standard error."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgrpo.safe_text.terminal import Terminal

console = Terminal(stderr=True)


def say(line: str) -> None:
    """One line, whatever the terminal's width."""
    console.print(line, soft_wrap=True)


def program() -> str:
    """How to call `fastgrpo` from a shell in the current folder."""
    if shutil.which("fastgrpo"):
        return "fastgrpo"
    installed = Path(sys.executable).with_name("fastgrpo")
    if not installed.is_file():
        return f"{sys.executable} -m fastgrpo"
    return str(installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed)


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback: a bar on a terminal, elsewhere a line now and then."""
    if not console.is_terminal:
        yield progress_lines(what)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_lines(what: str, every_seconds: float = 5.0) -> Callable[[int, int], None]:
    """A progress callback that prints a line now and then, and one at the end."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > every_seconds:
            last = time.monotonic()
            say(f"{what}: {done}/{total} questions")

    return progress
