"""Files that others made: whatever they hold, nothing of it runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2Config

from fastgrpo.cli.main import main


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("content", ["payload", "garbage", "empty"])
def test_checkpoints(build: Any, tmp_path: Path, marker: Path, file: str, content: str) -> None:
    build(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "manifest.json").unlink()  # or made to fit
    if content == "payload":
        torch.save({"state": Payload(marker)}, checkpoint / file)
    else:
        (checkpoint / file).write_bytes(b"" if content == "empty" else b"\0garbage" * 50)
    trainer = build(max_steps=2)
    if file == "training_args.bin":  # nobody reads it
        trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(ValueError, match=r"checkpoint-1 cannot be read \(.*Resume from another one"):
            trainer.train(resume_from_checkpoint=True)
    assert not marker.exists()


def test_a_model_folder_with_code_of_its_own(tiny_model_dir: Path, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    flags = ["--model_name_or_path", str(folder), "--dataset_name", "none.parquet", "--output_dir", str(tmp_path / "o")]
    assert main(["train", *flags, "--report_to", "none", "--use_cpu"]) == 2
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["weights", "adapters", "reward model"])
def test_pickled_weights(
    tiny_model_dir: Path, sat_file: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    flags = {"model_name_or_path": folder, "dataset_name": sat_file, "output_dir": tmp_path / "o", "report_to": "none"}
    if kind == "weights":
        shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    elif kind == "adapters":
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model_dir), "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        Qwen2Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9).save_pretrained(folder)
        flags |= {"model_name_or_path": tiny_model_dir, "reward_model_name_or_path": folder}
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        torch.save({"weight": Payload(marker)}, folder / name)
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    assert main(["train", *words, "--use_cpu"]) == 2
    assert f"{folder}" in capsys.readouterr().err.splitlines()[-1]
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_yaml_tags(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    (tmp_path / "config.yaml").write_text(f"output_dir: {tag} [{marker}]\n")
    for command in ("train", "sft"):
        assert main([command, "--config", str(tmp_path / "config.yaml")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    for command in ("lab", "profile"):
        assert main([command, str(tmp_path / "config.yaml")]) == 2
    assert not marker.exists()


def test_a_data_set_folder_with_a_script(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    flags = ["--model_name_or_path", "m", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "o")]
    assert main(["train", *flags, "--report_to", "none", "--use_cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_chat_templates_are_sandboxed(
    build: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, marker: Path, template: str
) -> None:
    from fastgrpo.model.load import load_processing

    processing = load_processing(str(tiny_model_dir))
    processing.tokenizer.chat_template = template.replace("MARKER", str(marker))
    with pytest.raises(Exception, match=r"unsafe|undefined|has no attribute"):
        processing.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert not marker.exists()
