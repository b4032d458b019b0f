"""A run's adapters."""

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.cli.main import main


@pytest.fixture(scope="session")
def adapter_dir(tiny_model_dir: Path, sat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with --use_peft on the tiny model; its adapters changed until they change what it says."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    flags = {
        "model_name_or_path": tiny_model_dir, "dataset_name": sat_file, "output_dir": out, "use_peft": "true",
        "lora_r": 4, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 3,
        "max_steps": 1, "report_to": "none", "use_cpu": "true", "prompt_template": "answer",
    }  # fmt: skip
    assert main(["train", *(str(token) for name, value in flags.items() for token in (f"--{name}", value))]) == 0
    base = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, out)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * (1 + parameter.data.abs().cumsum(0).cos())
    model.save_pretrained(out)
    return out
