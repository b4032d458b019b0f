"""What the documentation shows runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

from fastgrpo.cli.arguments import parse

ROOT = Path(__file__).parents[1]


def test_the_loop_without_the_trainer_runs(tiny_model_dir: Path, sat_file: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "minimal_loop.py"), str(tiny_model_dir), str(sat_file), "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert re.findall(r"^step (\d): loss \S+ reward \S+$", result.stdout, re.MULTILINE) == ["0", "1"]


def test_the_recipe_parses_and_says_what_the_paper_did() -> None:
    config, script = parse(["--config", str(ROOT / "configs" / "sat_qwen2_vl_2b.yaml")])
    assert config.batch_plan.completions_per_micro_batch == 8
    assert config.batch_plan.prompts_per_rollout == 2
    assert (config.loss_type, config.beta, config.top_k, config.learning_rate) == ("grpo", 0.04, 50, 1e-6)
    assert not config.use_bias_correction_kl
    assert (script.dataset_name, script.max_samples, script.max_pixels) == ("SAT", 15_000, 401_408)


def test_files_the_documentation_names_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    linked = [
        (page.parent / target, page.name)
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)", page.read_text())
        if not target.startswith("http")
    ]
    assert len(linked) > 20
    assert [(str(target), page) for target, page in linked if not target.exists()] == []


def test_the_modules_that_the_architecture_names_exist() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text()))
    folders = ("bench", "docs", "fastgrpo", "kernels", "profiling", "tests")
    files = [f"/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(named) > 50
    assert [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in files)] == []
