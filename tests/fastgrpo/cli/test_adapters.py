"""A folder of adapters is scored, asked, trained further and merged like a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from fastgrpo.cli.main import main
from fastgrpo.model.adapters import adapter_base
from fastgrpo.model.load import load_merged, load_policy, load_processing

QUESTION = "How many circles are there?"
Ask = Callable[..., str]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """`fastgrpo generate` of 8 tokens."""

    def run(model: Path, *flags: str) -> str:
        assert main(["generate", str(model), QUESTION, "--max_new_tokens", "8", "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out

    return run


def train(model: Path, data: Path, out: Path, *flags: str) -> int:
    settings = {
        "model_name_or_path": model, "dataset_name": data, "output_dir": out, "num_generations": 2,
        "per_device_train_batch_size": 2, "max_completion_length": 3, "max_steps": 1, "report_to": "none",
        "use_cpu": "true", "beta": 0.1,
    }  # fmt: skip
    return main(["train", *(str(token) for name, value in settings.items() for token in (f"--{name}", value)), *flags])


def test_adapters_know_their_base(adapter_dir: Path, tiny_model_dir: Path) -> None:
    assert adapter_base(str(adapter_dir)) == str(tiny_model_dir)
    assert adapter_base(str(tiny_model_dir)) is None
    assert adapter_base("./nowhere") is None


def test_a_merged_model_has_the_products_in_its_weights(
    adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(adapter_dir), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    merged = AutoModelForImageTextToText.from_pretrained(out).state_dict()
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_dir).state_dict()
    adapters = load_file(adapter_dir / "adapter_model.safetensors")
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    for name in changed:
        stem = "base_model.model." + name.removesuffix(".weight")
        product = adapters[f"{stem}.lora_B.weight"] @ adapters[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(merged[name], base[name] + 32 / 4 * product)
    assert json.loads((out / "settings.json").read_text())["prompt_template"] == "answer"
    assert load_processing(str(out)).image_processor is not None
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_adapters_and_what_they_merge_to_say_the_same(
    ask: Ask, adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert main(["merge", str(adapter_dir), str(tmp_path / "merged")]) == 0
    said = ask(adapter_dir)
    assert said.splitlines()[-1] == ask(tmp_path / "merged").splitlines()[-1]
    assert said.splitlines()[-1] != ask(tiny_model_dir, "--prompt_template", "answer").splitlines()[-1]


def test_adapters_are_scored(
    adapter_dir: Path, cvbench_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_samples", "4", "--max_new_tokens", "3", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(["eval", str(adapter_dir), str(cvbench_file), *flags]) == 0
    assert json.loads((tmp_path / "evals" / "eval.json").read_text())["num_questions"] == 4
    assert "template answer" in capsys.readouterr().err, "asked as the run asked"


def test_training_goes_on_from_adapters(
    adapter_dir: Path, sat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(adapter_dir, sat_file, tmp_path / "more", "--learning_rate", "0") == 0
    assert "of them trained" in capsys.readouterr().err
    before = load_file(adapter_dir / "adapter_model.safetensors")
    after = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "where they were left"
    assert adapter_base(str(tmp_path / "more")) == adapter_base(str(adapter_dir))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_peft", "--lora_r", "8"], "lora_r: "),
        (["--freeze_vision"], "freeze_vision=True, but "),
    ],
)
def test_settings_that_adapters_do_not_take(
    adapter_dir: Path,
    sat_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert train(adapter_dir, sat_file, tmp_path / "out", *flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastgrpo train: error: {message}")
    assert "holds adapters" in line


def test_merge_refuses_what_it_cannot_merge(
    adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    lost = tmp_path / "lost"
    shutil.copytree(adapter_dir, lost)
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    for adapter, out, message in (
        (tiny_model_dir, tmp_path / "new", "holds no adapters"),
        (adapter_dir, tmp_path / "full", "is not empty: name a new folder"),
        (lost, tmp_path / "new", "'./gone' is neither a folder nor a model reachable on the hub (the adapters in"),
    ):
        assert main(["merge", str(adapter), str(out)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_merged_model_in_memory_is_for_use_alone(adapter_dir: Path) -> None:
    model = load_merged(str(adapter_dir))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = [name for name, p in load_policy(str(adapter_dir)).named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
