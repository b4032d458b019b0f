"""Inputs that cannot work: every row of data/bad_inputs.yaml ends in one line that names it and says what to do."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fastgrpo.cli.main import COMMANDS, main


def expanded(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each of the values in braces."""
    command = command_of(row)
    found = re.search(r"\{([\w.,+-]+)\}", row[command])
    return [row | {command: row[command].replace(found[0], one)} for one in found[1].split(",")] if found else [row]


def command_of(row: dict[str, Any]) -> str:
    return next(name for name in COMMANDS if name in row)


FILE = Path(__file__).parent / "data" / "bad_inputs.yaml"
ROWS = [one for row in yaml.safe_load(FILE.read_text()) for one in expanded(row)]
DEFAULTS = {
    "train": "--model_name_or_path tiny --dataset_name sat.parquet --output_dir out --num_generations 2 "
    "--per_device_train_batch_size 4 --max_completion_length 3 --max_steps 1 --report_to none --save_strategy no "
    "--use_cpu true",
    "sft": "--model_name_or_path tiny --dataset_name sat.parquet --output_dir out --per_device_train_batch_size 2 "
    "--max_steps 1 --report_to none --save_strategy no --use_cpu true",
    "profile": "--output_dir out --max_steps 1",
}
"""Flags of a command, unless a row gives them."""


def name_of(row: dict[str, Any]) -> str:
    files = ", ".join(name for name in row if name not in COMMANDS and name != "told")
    return f"{command_of(row)} {row[command_of(row)]} {files}".strip()[:100]


def tokens_of(row: dict[str, Any]) -> list[str]:
    given = shlex.split(row[command_of(row)])
    named = {token.split("=")[0] for token in given}
    words = DEFAULTS.get(command_of(row), "").split()
    return [*given, *(w for pair in zip(words[::2], words[1::2], strict=True) if pair[0] not in named for w in pair)]


def wanted(row: dict[str, Any]) -> list[str]:
    """What the line must hold: of a single text, also the first flag's name and values."""
    if not isinstance(row["told"], str):
        return list(map(str, row["told"]))
    flag, *values = shlex.split(row[command_of(row)].replace("=", " "))
    until = next((i for i, value in enumerate(values) if value.startswith("--")), len(values))
    return [flag.lstrip("-"), *values[:until], row["told"]]


def write(path: Path, content: Any) -> None:
    """Makes a file of a row: a text, rows, or what is done to the file that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case None:
            path.unlink()
        case str():
            path.write_text(content)
        case list() if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        case list():
            path.write_text("".join(json.dumps(one) + "\n" for one in content))
        case {"hex": digits}:
            path.write_bytes(bytes.fromhex(digits))
        case {"first": count}:
            path.write_bytes(path.read_bytes()[:count])
        case {"folder": _}:
            path.unlink(missing_ok=True)
            path.mkdir()
        case changes:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def templates(
    tiny_model_dir: Path, sat_file: Path, cvbench_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What rows name, and have a changed copy of where they change its files."""
    folder = tmp_path_factory.mktemp("templates")
    os.symlink(tiny_model_dir, folder / "tiny")
    os.symlink(sat_file, folder / "sat.parquet")
    os.symlink(cvbench_file, folder / "cvbench.parquet")
    datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}] * 4).save_to_disk(folder / "saved")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    adapters = folder / "adapters"
    adapters.mkdir()
    told = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model_dir), "r": 2, "target_modules": ["q_proj"]}
    (adapters / "adapter_config.json").write_text(json.dumps(told))
    (adapters / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def place(row: dict[str, Any], templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a row's files, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    files = {name: content for name, content in row.items() if name not in COMMANDS and name != "told"}
    changed = {name.split("/")[0] for name in files}
    for template in templates.iterdir():
        if template.name in changed:
            shutil.copytree(template.resolve(), tmp_path / template.name)
        else:
            os.symlink(template, tmp_path / template.name)
    for name, content in files.items():
        write(tmp_path / name, content)
    return tmp_path


@pytest.fixture(scope="module")
def counts(pytestconfig: pytest.Config) -> Iterator[Counter[str]]:
    """How the rows end; told when all have."""
    found: Counter[str] = Counter()
    yield found
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{json.dumps({'campaign': 'bad inputs', 'rows': found.total(), **found})}")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_bad_input_is_one_line(
    row: dict[str, Any], place: Path, counts: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = command_of(row)
    try:
        code = main([command, *tokens_of(row)])
    except Exception:
        counts["traceback"] += 1
        raise
    lines = capsys.readouterr().err.splitlines()
    kind = "accepted" if code == 0 else "lacking"
    told = [line for line in lines if line.startswith(f"fastgrpo {command}: error: ")]
    lacks = [text for text in wanted(row) if text not in (told or [""])[0]]
    if code == 2 and told == lines[-1:] and not lacks:
        kind = "clear"
    counts[kind] += 1
    assert kind == "clear", f"{kind}: {lines[-3:]} lacks {lacks}"


@pytest.mark.parametrize("row", ROWS[::200], ids=name_of)
def test_a_process_ends_so_too(row: dict[str, Any], place: Path) -> None:
    command = [sys.executable, "-m", "fastgrpo", command_of(row), *tokens_of(row)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert all(text in ended.stderr.splitlines()[-1] for text in wanted(row))
    assert "Traceback" not in ended.stderr
