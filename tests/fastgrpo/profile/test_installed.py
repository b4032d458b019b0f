"""`fastgrpo profile` without a checkout: from a copy of the packages alone, as a wheel installs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIG = (
    "{batch_unit: prompts, per_device_train_batch_size: 1, num_generations: 2, max_completion_length: 4, use_cpu: true}"
)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A site-packages folder that holds our three packages."""
    folder = tmp_path / "lib" / "site-packages"
    for package in (
        ROOT / "fastgrpo",
        ROOT / "kernels" / "fastgrpo_kernels",
        ROOT / "profiling" / "fastgrpo_profiling",
    ):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=installed.parents[1]
    )


@pytest.mark.slow
def test_the_published_codes_side_runs(installed: Path) -> None:
    (installed.parents[1] / "config.yaml").write_text(CONFIG)
    done = python(
        installed, *["-m", "fastgrpo", "profile", "config.yaml", "--against", "paper", "--steps", "1", "--warmup", "0"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((installed.parents[1] / "runs" / "profile" / "profile.json").read_text())
    assert set(record["sides"]) == {"ours", "paper"}


def test_trls_side_is_part_of_the_package_and_site_packages_are_not_handed_on(installed: Path) -> None:
    code = (
        "from importlib.util import find_spec; from fastgrpo.profile.sides.start import TRL_WORKER, trl_environment; "
        "print(find_spec(TRL_WORKER).origin); print(trl_environment()['PYTHONPATH'])"
    )
    done = python(installed, "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    worker, path = done.stdout.splitlines()
    assert Path(worker) == installed / "fastgrpo" / "profile" / "sides" / "trl.py"
    # Only what was there already: this test's own PYTHONPATH.
    assert path == str(installed)
