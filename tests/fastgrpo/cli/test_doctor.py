from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tile_tokenizer import tile_tokenizer
from tiny_families import image_processor, tiny_config
from transformers import GptOssConfig

from fastgrpo.cli import doctor
from fastgrpo.cli.doctor import OPTIONAL, examine
from fastgrpo.cli.doctor_model import examine_model
from fastgrpo.cli.main import main
from fastgrpo.model.families import family_of
from fastgrpo.model.load import load_processing


def found(part: str) -> doctor.Finding:
    [finding] = [finding for finding in examine() if finding.part == part]
    return finding


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name in names:
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(doctor, "version", version)


def test_every_part_is_told_once() -> None:
    parts = [finding.part for finding in examine()]
    assert len(parts) == len(set(parts))
    assert {"python", "torch", "device", "transformers", *OPTIONAL} <= set(parts)
    assert {"triton", "flash-attn", "liger-kernel", "deepspeed", "torchvision"} <= set(parts)
    assert found("torch").found == torch.__version__


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_part_says_what_it_costs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    missing(monkeypatch, name)
    gives, costs = OPTIONAL[name]
    assert (found(name).found, found(name).consequence) == ("missing", costs)
    missing(monkeypatch)
    assert (found(name).found, found(name).consequence) == ("1.2.3", gives)


def test_device_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("device").found.startswith("cpu, ")
    assert "no CUDA device" in found("device").consequence


@pytest.mark.parametrize(("bf16", "consequence"), [(True, "bf16 by default"), (False, "no bf16: float32, slower")])
def test_device_with_cuda(monkeypatch: pytest.MonkeyPatch, bf16: bool, consequence: str) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert (found("device").found, found("device").consequence) == ("4 × NVIDIA H200, 140 GiB", consequence)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("torch", "device", *OPTIONAL))


def test_a_model_is_told_its_paths(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {row.part: row for row in examine_model(str(tiny_model_dir))}
    assert told["model"].found.startswith("Qwen2VLForConditionalGeneration")
    assert (told["sampling"].found, told["update"].found) == ("packed decoder", "packed, shared prompts")
    assert told["positions"].found == "M-RoPE"
    assert told["pictures"].found == "<|vision_start|><|image_pad|><|vision_end|>"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    GptOssConfig(
        **sizes, head_dim=16, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1
    ).save_pretrained(tmp_path)
    told = {row.part: row for row in examine_model(str(tmp_path))}
    assert told["sampling"].found == "transformers' generate"
    assert "attention sinks" in told["sampling"].consequence
    assert told["update"].found == "padded batches"
    assert main(["doctor", str(tmp_path)]) == 0
    assert "padded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "place", "note"),
    [
        ("LLaVA-OneVision", "<image>", "16 placeholders"),
        ("SmolVLM", "<fake_token_around_image><global-img><image><fake_token_around_image>", "4 placeholders a tile;"),
        (
            "Gemma 3 with pictures",
            "<start_of_image><image_soft_token><end_of_image>",
            "a picture's tokens see all of it",
        ),
    ],
)
def test_how_a_model_takes_pictures(tmp_path: Path, name: str, place: str, note: str) -> None:
    config = tiny_config(name)
    tokenizer = tile_tokenizer(family_of(config))
    config.image_token_id = tokenizer.image_token_id
    for part in (config, tokenizer, image_processor(name)):
        part.save_pretrained(tmp_path)
    told = {row.part: row for row in examine_model(str(tmp_path))}
    assert (told["sampling"].found, told["update"].found) == ("generic decoder", "packed, shared prompts")
    assert told["positions"].found == "1-D"
    assert told["pictures"].found == place
    assert note in told["pictures"].consequence
    assert told["prompts"].found == "chat template"
    with pytest.raises(ValueError, match=r"max_pixels=3000, but .* cuts pictures into tiles of one size: leave it out"):
        load_processing(str(tmp_path), max_pixels=3000)


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is a folder without a usable config.json" in capsys.readouterr().err
