"""Labs of a tiny model, as YAML files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def lab_file(tiny_model_dir: Path, sat_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """lab_file(**fields) writes a lab of one arm and one seed; `fields` replace its own."""

    def write(**changed: Any) -> Path:
        content = {
            "output_dir": str(tmp_path / "lab"),
            "seeds": [0],
            "settings": {
                "model_name_or_path": str(tiny_model_dir), "dataset_name": str(sat_file), "num_generations": 2,
                "per_device_train_batch_size": 4, "max_completion_length": 3, "max_steps": 3, "report_to": "none",
                "save_steps": 1, "use_cpu": True, "logging_steps": 1,
            },
            "arms": {"rl": {}},
        }  # fmt: skip
        file = tmp_path / "lab.yaml"
        file.write_text(yaml.safe_dump({**content, **changed}, sort_keys=False))
        return file

    return write
