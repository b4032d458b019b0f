"""Every setting of TRL's `GRPOConfig` (`bench/record_trl_settings.py` recorded them) has a place, and means it."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.cli.main import main
from fastgrpo.config import GRPOConfig
from fastgrpo.settings.trl_settings import HONOURED, MAPPED, OTHER_DEFAULTS, REFUSED, markdown_table, trl_settings

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((Path(__file__).parent / "recordings" / "trl_grpo_config.json").read_text())["defaults"]
OURS = {one.name: one for one in fields(GRPOConfig)}
OTHER_VALUES = {
    "parallelism_config": {"cp_size": 2}, "fsdp_config": {"version": 2}, "include_num_input_tokens_seen": "all",
    "label_names": ["labels"], "include_for_metrics": ["loss"], "train_sampling_strategy": "sequential",
    "transformers_continuous_batching_config": {"max_batch_tokens": 8}, "pad_to_multiple_of": "8",
}  # fmt: skip
"""A value other than the default, where one of the default's kind would not do."""


def default_of(name: str) -> Any:
    one = OURS[name]
    return one.default if one.default_factory is MISSING else one.default_factory()


def other_value(name: str) -> Any:
    default = RECORDED[name]
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else 3 if default is None else "other"


def make(tmp_path: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_each_setting_stands_in_the_table_once() -> None:
    named = [one.name for one in trl_settings()]
    assert len(named) == len(set(named))
    assert set(named) == set(RECORDED)
    assert set(OURS) >= set(RECORDED)


def test_defaults_are_trls_but_for_those_that_are_told() -> None:
    different = {
        name
        for name, default in RECORDED.items()
        if (value := default_of(name)) != default and getattr(value, "value", value) != default
    }
    assert different == set(OTHER_DEFAULTS)


def test_trls_own_defaults_may_all_be_passed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = ("output_dir", "use_cpu", "report_to")
    make(tmp_path, **{name: value for name, value in RECORDED.items() if name not in own})
    assert not [one for one in caplog.records if one.name.startswith("fastgrpo")]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_setting_is_an_error_with_its_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=") as caught:
        make(tmp_path, **{name: other_value(name)})
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_a_mapped_setting_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    make(tmp_path, **{name: other_value(name)})
    [warning] = [one.getMessage() for one in caplog.records if "work differently" in one.getMessage()]
    assert f"{name}: {MAPPED[name].rstrip('.')}" in warning


def test_what_is_honoured_is_told_of_by_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    assert not [one for one in caplog.records if one.name.startswith("fastgrpo")]
    assert not set(HONOURED) & (set(MAPPED) | set(REFUSED))


def test_the_documentation_shows_the_table() -> None:
    text = (ROOT / "docs" / "from_trl.md").read_text()
    assert markdown_table() in text, "write the table of fastgrpo.settings.trl_settings.markdown_table there"


def test_doctor_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["doctor", "--trl"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {one.name} " in printed for one in trl_settings())
    assert "There is no vLLM engine to set up." in printed
