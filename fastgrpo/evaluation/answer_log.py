"""Answers on disk as they are given, so that a killed evaluation goes on where it was."""

import base64
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fastgrpo.evaluation.ranks import Ranks

Records = list[dict[str, Any]]


class AnswerLog:
    """A folder with a file of lines for each rank: the first says what was asked of whom, each other is one answer.

    Args:
        folder: of one model's answers.
        key: all that the answers depend on. Answers to another key are dropped.
        ranks: this process writes its own file, and reads all: an evaluation may go on on more or fewer ranks.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        self.folder = folder
        self.header = json.dumps(key, sort_keys=True, default=str)
        self.file = folder / f"rank-{(ranks or Ranks()).index}.jsonl"
        self.kept: dict[tuple[str, int], Records] = {}
        """(pass, row) → its answers."""
        self._stream: IO[str] | None = None
        for file in sorted(folder.glob("rank-*.jsonl")):
            self.kept |= dict(map(_parse, self._lines(file)))

    def _lines(self, file: Path) -> list[str]:
        """A file's answers to this key, but for one that a kill cut off."""
        header, *lines = file.read_text(errors="replace").split("\n")
        return list(filter(_is_whole, lines)) if header == self.header else []

    def add(self, name: str, row_id: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes the answers to a question; whatever happens to this process, they are not asked for again."""
        if self._stream is None:
            self._stream = self._open()
        line = {"pass": name, "row_id": row_id, "answers": [_to_json(record) for record in records]}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def _open(self) -> IO[str]:
        """This rank's file, without a line cut off and without answers to another key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self._lines(self.file) if self.file.exists() else []
        self.file.write_text("\n".join([self.header, *lines]) + "\n")
        return self.file.open("a")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Deletes the answers, once what they were for is written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"base64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for name, v in record.items()}


def _parse(line: str) -> tuple[tuple[str, int], Records]:
    content = json.loads(line)
    records = [
        {name: base64.b64decode(v["base64"]) if isinstance(v, dict) else v for name, v in record.items()}
        for record in content["answers"]
    ]
    return (content["pass"], content["row_id"]), records
