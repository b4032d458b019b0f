"""What campaigns share: runs in forks of this process, what two equal runs have in common, the table at the end."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import commit, device_name, now, versions

from fastgrpo.cli.main import main
from fastgrpo.report import finish

for module in ("fastgrpo.cli.train", "deepspeed"):  # once, not in each fork
    if find_spec(module):
        import_module(module)

RESULTS = os.environ.get("CAMPAIGN")
"""The file that `make campaign` writes. Without it campaigns take their short form."""
TINY = [
    "--max_samples", "6", "--num_generations", "4", "--per_device_train_batch_size", "8", "--max_completion_length",
    "6", "--use_cpu", "--learning_rate", "0.01", "--logging_steps", "2", "--save_steps", "1", "--report_to", "none",
    "--disable_tqdm", "true", "--reward_funcs", "campaign_rewards:varied",
]  # fmt: skip
LAST = ("--resume_from_checkpoint", "last")


class Runs:
    """Runs of one configuration into folders below `folder`, each in a fork, which has everything imported."""

    def __init__(self, folder: Path, model: Path, data: Path, *flags: str, draws: bool = True) -> None:
        """`draws`: the report too, which takes longer than a run."""
        folder.mkdir()
        self.folder, self.draws = folder, draws
        self.flags = ["train", "--model_name_or_path", str(model), "--dataset_name", str(data), *TINY, *flags]

    def start(self, name: str, output: int, *flags: str, before: Callable[[], object] = lambda: None) -> int:
        """A run whose standard output and error go to a descriptor; its process.

        Args:
            before: called in the new process, before the run.
        """
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code: Any = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            logging.root.handlers.clear()  # pytest's: without any, warnings go to standard error, as in a program
            for handler in logging.getLogger("transformers").handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not self.draws:
                finish.write_report = lambda *_, **__: None  # type: ignore[assignment]
            before()
            code = main([*self.flags, "--output_dir", str(self.folder / name), *flags])
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            for worker in multiprocessing.active_children():  # a data loader's, which would keep the output open
                worker.kill()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, name: str, *flags: str, before: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """The exit code of a run, and what it said."""
        reading, writing = os.pipe()
        pid = self.start(name, writing, *flags, before=before)
        os.close(writing)
        with os.fdopen(reading, errors="replace") as output:
            said = output.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said

    def succeed(self, name: str, *flags: str) -> Path:
        """The folder of a run that ended well."""
        code, said = self.finish(name, *flags)
        assert code == 0, said
        return self.folder / name

    def stopped(self, name: str, whole: Path, step: int) -> Path:
        """A copy of a whole run as it was when it had saved a step."""
        out = Path(shutil.copytree(whole, self.folder / name))
        for path in (*out.glob("checkpoint-*"), *out.glob("completions/*.parquet")):
            if int(path.stem.replace("_", "-").split("-")[1]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (*out.glob("*.safetensors"), out / "summary.json", out / "report.html"):
            path.unlink(missing_ok=True)
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[:step]))
        return out


def content(out: Path) -> dict[str, Any]:
    """What two equal runs have in common: figures of every step, completions, weights."""
    lines = [_without_clocks(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    completions = {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "completions").iterdir())}
    return {"metrics": lines, "completions": completions, "weights": weights(out)}


def weights(out: Path) -> dict[str, bytes]:
    """The trained model's."""
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def _without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    clocks = ("time/", "share/", "step_time", "tokens_per_second", "mfu")
    return {name: value for name, value in line.items() if not name.startswith(clocks)}


def last_lines(said: str) -> list[str]:
    """What a run said of its end."""
    return [line for line in said.splitlines() if ": error" in line]


def report(
    capsys: pytest.CaptureFixture[str],
    campaign: str,
    rows: Mapping[str, Any],
    total: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda rows: {},
    **totals: Any,
) -> None:
    """Prints a campaign's table and its JSON line, and adds both to the file of results.

    Args:
        total: what all rows of the file come to, those of other tests included.
    """
    with capsys.disabled():
        width = max(map(len, rows))
        print("", *(f"{name:<{width}}  {row}" for name, row in rows.items()), sep="\n")
        print(json.dumps({"campaign": campaign, **totals, **total(rows)}))
    if RESULTS is None:
        return
    file = Path(RESULTS)
    about = {"bench": "campaign", "device": device_name("cpu"), "date": now(), "commit": commit()}
    known = json.loads(file.read_text()) if file.exists() else {"figures": {}}
    figures = known["figures"]
    before = figures.get(campaign, {"commits": [], "rows": {}})
    rows = {**before["rows"], **rows}
    commits = sorted({*before["commits"], commit()})
    figures[campaign] = {"commits": commits, **totals, **total(rows), "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**about, "versions": versions(), "figures": figures}, indent=1) + "\n")
