"""`fastgrpo profile --against trl`, where TRL's own environment has been made (`make install-bench`)."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastgrpo.cli.main import main
from fastgrpo.profile.sides.start import require_trl

TRL_PYTHON = Path(__file__).parents[3] / ".venv-bench" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not TRL_PYTHON.exists(), reason="TRL's environment is missing: make install-bench")
def test_trl_does_the_same_step(tiny_model_dir, sat_file, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "{batch_unit: prompts, per_device_train_batch_size: 2, num_generations: 2, max_completion_length: 6, "
        "beta: 0.04, use_cpu: true}"
    )
    given = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(sat_file)]
    options = ["--against", "trl", "--steps", "2", "--trl_python", str(TRL_PYTHON), "--output_dir", str(tmp_path)]
    assert main(["profile", str(config), *options, *given]) == 0
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["gate"]["prompts that differ"] == 0
    assert record["sides"]["trl"]["tokens"] > 0
    for phase in ("vision", "prefill", "decode", "reference", "forward", "backward", "optimizer"):
        assert record["sides"]["trl"]["phases"][phase] > 0, phase


@pytest.mark.skipif(find_spec("trl") is not None, reason="TRL is installed beside fastgrpo")
def test_an_environment_without_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--trl_python .* lacks trl: install it there, or name another"):
        require_trl(Path(sys.executable))
    with pytest.raises(ValueError, match="is missing: run `make install-bench`"):
        require_trl(tmp_path / "python")
