"""What TRL's scripts import from the package beside trainer and settings."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgrpo
from fastgrpo import (
    DatasetMixtureConfig,
    GRPOConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)

pytest.importorskip("datasets")


@dataclass
class Extra:
    number: int = 1
    name: str = "none"


@pytest.fixture
def settings_file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", fastgrpo.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(fastgrpo, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = fastgrpo.nothing


def test_flags_become_a_scripts_four_dataclasses(tmp_path: Path) -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig))
    script, settings, model, mixture = parser.parse_args_and_config(
        ["--dataset_name", "org/data", "--output_dir", str(tmp_path), "--use_cpu", "--num_generations", "4",
         "--model_name_or_path", "org/model", "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj",
         "v_proj"]
    )  # fmt: skip
    assert (script.dataset_name, script.dataset_train_split, script.dataset_streaming) == ("org/data", "train", False)
    assert (settings.num_generations, settings.output_dir) == (4, str(tmp_path))
    assert (model.model_name_or_path, model.lora_target_modules) == ("org/model", ["q_proj", "v_proj"])
    assert mixture.datasets == []


def test_a_file_gives_defaults_that_flags_override(settings_file: Any) -> None:
    file = settings_file("number: 5\nname: file\n")
    (extra,) = TrlParser(Extra).parse_args_and_config(["--config", file, "--name", "flag"])
    assert extra == Extra(5, "flag")


def test_a_files_env_sets_environment_variables(settings_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_TEST_VARIABLE", "before")
    TrlParser(Extra).parse_args_and_config(["--config", settings_file("env:\n  FASTGRPO_TEST_VARIABLE: 3\n")])
    assert os.environ["FASTGRPO_TEST_VARIABLE"] == "3"


def test_an_unknown_setting_of_a_file_is_named(settings_file: Any) -> None:
    file = settings_file("nubmer: 5\n")
    with pytest.raises(ValueError, match="nubmer"):
        TrlParser(Extra).parse_args_and_config(["--config", file])
    assert TrlParser(Extra).parse_args_and_config(["--config", file], fail_with_unknown_args=False) == (Extra(),)


def test_unknown_words_are_returned_when_asked(settings_file: Any) -> None:
    words = ["--config", settings_file("other: 5\n"), "--more", "x"]
    parser = TrlParser(Extra)
    assert parser.parse_args_and_config(list(words), return_remaining_strings=True)[1] == [
        "--other",
        "5",
        "--more",
        "x",
    ]
    apart = TrlParser(Extra).parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert apart[1:] == (["--other", "5"], ["--more", "x"])


def test_a_file_that_is_no_mapping_is_refused(settings_file: Any) -> None:
    with pytest.raises(ValueError, match="map setting names"):
        TrlParser(Extra).parse_args_and_config(["--config", settings_file("- 1\n")])


def test_config_is_no_name_for_a_field() -> None:
    @dataclass
    class Bad:
        config: str = ""

    with pytest.raises(ValueError, match="Bad has a field `config`"):
        TrlParser(Bad)


def test_no_adapters_unless_asked() -> None:
    assert get_peft_config(ModelConfig()) is None


def test_adapters_by_trls_flags() -> None:
    lora = get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], use_dora=True))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (4, 32, 0.05, "all-linear")
    assert (lora.use_dora, lora.bias, lora.task_type) == (True, "none", "CAUSAL_LM")


def test_no_quantization_unless_asked() -> None:
    assert get_quantization_config(ModelConfig()) is None


def test_quantization_by_trls_flags() -> None:
    four = get_quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16"))
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit


def test_4_and_8_bits_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="load_in_8bit"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)


def test_a_value_that_is_no_choice_is_named() -> None:
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='nf5'"):
        ModelConfig(bnb_4bit_quant_type="nf5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is one")
def test_no_device_map_without_a_gpu() -> None:
    assert get_kbit_device_map() is None


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of rows: ten and four."""
    paths = []
    for name, count in (("a", 10), ("b", 4)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"prompt": "{name}{i}", "extra": {i}}}\n' for i in range(count)))
        paths.append(str(path))
    return paths


def mixture(files: list[str], **settings: Any) -> Any:
    parts = settings.pop("parts", [{}, {}])
    named = [{"path": "json", "data_files": file, **part} for file, part in zip(files, parts, strict=True)]
    return get_dataset(DatasetMixtureConfig(datasets=named, **settings))


def test_a_mixture_joins_its_data_sets(files: list[str]) -> None:
    assert mixture(files)["train"].num_rows == 14


def test_fractions_make_the_largest_mixture_without_repeats(files: list[str]) -> None:
    found = mixture(files, parts=[{"fraction": 1.0}, {"fraction": 1.0}])["train"]["prompt"]
    assert sorted(found) == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"]


def test_fractions_are_for_all_or_none(files: list[str]) -> None:
    with pytest.raises(ValueError, match="fraction"):
        mixture(files, parts=[{"fraction": 1.0}, {}])


def test_columns_may_be_chosen(files: list[str]) -> None:
    parts = [{"columns": ["prompt"]}, {"columns": ["prompt"]}]
    assert mixture(files, parts=parts)["train"].column_names == ["prompt"]


def test_a_mixture_may_be_a_stream(files: list[str]) -> None:
    stream = mixture(files, streaming=True)["train"]
    assert sum(1 for _ in stream) == 14
    with pytest.raises(ValueError, match="stream"):
        mixture(files, streaming=True, parts=[{"fraction": 1.0}, {"fraction": 1.0}])


def test_a_test_split_may_be_cut_off(files: list[str]) -> None:
    found = mixture(files, test_split_size=0.5)
    assert {name: part.num_rows for name, part in found.items()} == {"train": 7, "test": 7}


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="datasets is empty"):
        get_dataset(DatasetMixtureConfig())


def test_model_settings_are_trls() -> None:
    names = {field.name for field in fields(ModelConfig)}
    assert {"model_revision", "lora_target_parameters", "bnb_4bit_quant_storage", "use_rslora"} <= names
