"""The recipes in configs/ are what the programs take."""

from pathlib import Path

import pytest

from fastgrpo.cli.arguments import parse
from fastgrpo.cli.main import main
from fastgrpo.lab.config import read_lab

CONFIGS = Path(__file__).parents[1] / "configs"
ON_CPU = ("--use_cpu", "true", "--bf16", "false", "--report_to", "none")
"""What a machine without a GPU changes of them."""


@pytest.mark.parametrize("processes", ["one_gpu", "four_gpus"])
def test_a_step_of_the_papers_run_takes_8_prompts(processes, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    files = ("--config", "configs/sat_qwen2_vl_2b.yaml", "--config", f"configs/{processes}.yaml")
    without_deepspeed = ("--deepspeed", "") if processes == "four_gpus" else ()
    config, _ = parse([*files, *ON_CPU, *without_deepspeed])
    ranks = {"one_gpu": 1, "four_gpus": 4}[processes]
    assert ranks * config.batch_plan.prompts_per_rollout == 8


def test_the_smoke_run(sat_file, cvbench_file, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    files = ("--config", "configs/sat_qwen2_vl_2b.yaml", "--config", "configs/cpu_smoke.yaml")
    data = ("--dataset_name", str(sat_file), "--eval_dataset_name", str(cvbench_file), "--output_dir", str(tmp_path))
    assert main(["train", *files, *data]) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("lab_*.yaml")), ids=lambda file: file.stem)
def test_a_labs_file_is_read(file, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    lab = read_lab(file)
    assert len(lab.arms) >= 5
    assert len(lab.seeds) >= 3
    for arm in lab.arms:
        assert "model_name_or_path" in arm.settings
