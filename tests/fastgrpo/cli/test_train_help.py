"""`fastgrpo train --help`."""

from dataclasses import Field, fields
from typing import Any

import pytest

from fastgrpo.cli.main import main
from fastgrpo.cli.run_arguments import MAPPED, ScriptArguments
from fastgrpo.cli.train_help import GROUPS, SFT, TRAIN, Page, help_groups, help_text
from fastgrpo.settings.trl_fields import FOREIGN


def flags(page: Page) -> dict[str, Field[Any]]:
    return {field.name: field for record in page.records for field in fields(record)}


ALL = flags(TRAIN)


def test_groups_name_flags_that_exist_once() -> None:
    named = [name for names in GROUPS.values() for name in names]
    assert set(named) <= set(ALL) | set(flags(SFT))
    assert len(named) == len(set(named))


def test_help_shows_ours_and_help_all_every_flag() -> None:
    shown = {field.name for found in help_groups(False).values() for field in found}
    assert {field.name for field in fields(ScriptArguments)} - set(MAPPED) <= shown
    assert "loss_type" in shown
    assert not shown & FOREIGN
    for page in (TRAIN, SFT):
        assert {field.name for found in help_groups(True, page).values() for field in found} == set(flags(page))


def test_sft_has_a_page_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: fastgrpo sft ")
    assert "--train_on_prompt" in page
    assert "--num_generations" not in page
    assert "--packing" not in page
    assert main(["sft", "--help_all"]) == 0
    assert "--packing" in capsys.readouterr().out


def test_the_page_begins_with_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    page = capsys.readouterr().out.splitlines()
    assert len(page) < 340
    begins = [page.index(f"{title}:") for title in ("Model", "Data and prompts", "Rewards", "Objective")]
    assert begins == sorted(begins)
    assert begins[2] < 80
    assert not any(line.startswith("  --neftune_noise_alpha") for line in page)
    assert main(["train", "--help_all"]) == 0
    assert "  --neftune_noise_alpha X" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 118])
def test_lines_fit_and_defaults_are_told(width: int) -> None:
    lines = help_text(False, width).splitlines()
    described = [line for line in lines[4:-1] if not line.startswith("  --")]
    assert all(len(line) <= width for line in described)
    text = " ".join(help_text(False, 118).split())
    assert "Peak learning rate. (1e-06)" in text
    assert "--prompt_mode base|instruct" in text
    assert "--[no_]shuffle_dataset" in text
    assert "(required)" in text
