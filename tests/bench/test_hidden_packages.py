"""The suite on a machine that came with PyTorch and transformers and has no more than they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import suite
from stages import STAGES

HIDDEN = (
    *("datasets", "math_verify", "dill", "multiprocess", "latex2sympy2_extended", "antlr4"),
    *("deepspeed", "liger_kernel", "nvtx"),
)
BLOCKER = f'''
import sys
from importlib.machinery import PathFinder

HIDDEN = {HIDDEN}

class Hiding(PathFinder):
    """Finds what is installed, but for these."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
'''
BENCH = Path(suite.__file__).parent


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which Python finds none of these packages."""
    folder = tmp_path / "hiding"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    path = [str(folder), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def test_every_stage_can_be_imported(environment: dict[str, str]) -> None:
    code = f"""
from importlib.util import find_spec
assert not [name for name in {HIDDEN} if find_spec(name)]
from stages import STAGES
for stage in STAGES:
    stage.load()
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=BENCH, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.slow
def test_the_whole_suite_runs(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    flags = ["--device", "cpu", "--scale", "smoke", "--minutes", "30", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, str(BENCH / "suite.py"), *flags], env=environment, capture_output=True, text=True
    )
    stages = json.loads(out.read_text())["stages"]
    faults = {name: one["note"] for name, one in stages.items() if one["status"] not in ("passed", "skipped")}
    assert not faults
    assert set(stages) == {stage.name for stage in STAGES}
    assert run.returncode == 0
