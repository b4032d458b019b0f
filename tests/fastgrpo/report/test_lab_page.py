"""The aha page, and what stands in its table."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastgrpo.cli.main import main
from fastgrpo.report.arm_evaluations import evaluation_rows
from fastgrpo.report.arm_table import arm_rows, paired_rows, question_differences, seed_differences
from fastgrpo.report.arms import read_lab_runs
from fastgrpo.report.lab_page import render_lab

PLAIN = str.maketrans({"\N{NO-BREAK SPACE}": " ", "\N{MINUS SIGN}": "-"})


def test_page_of_a_lab(fake_lab, tmp_path, capsys):
    claims = [{
        "says": "Responses grow longer under RL on base",
        "conditions": [{"arm": "rl_base", "measure": "training/length", "direction": "up"}],
    }]  # fmt: skip
    folder = fake_lab({"rl_base": {}, "control": {"accuracy_after": 0.31}}, claims=claims)
    assert main(["report", str(folder), "--export", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    for text in (
        "Responses grow longer under RL on base",
        "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}3 seeds",
        "what control is",
    ):
        assert text in page
    assert "<script" not in page
    outcomes = json.loads((folder / "outcomes.json").read_text())
    (claim,) = outcomes["claims"]
    assert (claim["says"], claim["answer"]) == ("Responses grow longer under RL on base", "yes")
    assert [last for _, last in outcomes["arms"]["control"]["held_out/accuracy"]] == [0.31] * 3
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    charts = ("accuracy", "length", "reflection", "correction", "entropy", "kl")
    assert names == {f"arms-{name}.{ending}" for name in charts for ending in ("svg", "png")}
    assert (tmp_path / "figures" / "arms-length.png").read_bytes().startswith(b"\x89PNG")


def test_a_lab_under_way_says_what_is_missing(fake_lab):
    folder = fake_lab({"rl": {}}, seeds=(0, 1))
    (folder / "rl" / "seed-1" / "summary.json").unlink()
    content = json.loads((folder / "lab.json").read_text())
    (folder / "lab.json").write_text(json.dumps({**content, "seeds": [0, 1, 2]}))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "rl seed 1: not finished" in page
    assert "rl seed 2: nothing yet" in page


def test_a_lab_and_a_run_have_no_common_page(fake_lab, fake_run, capsys):
    assert main(["report", str(fake_lab({"rl": {}}, seeds=(0,))), str(fake_run())]) == 2
    assert "which has a page of its own" in capsys.readouterr().err


def test_settings_that_only_one_program_has_are_no_difference(fake_lab):
    folder = fake_lab({"rl": {"steps": 5}, "control": {"steps": 5}, "sft": {"steps": 5}}, seeds=(0,))
    for arm, changed in {"rl": {"beta": 0.04}, "control": {"beta": 0.1}, "sft": {"train_on_prompt": False}}.items():
        settings = {"model_name_or_path": "m", "top_k": 50, "learning_rate": 1e-6, **changed}
        if arm == "sft":
            del settings["top_k"]
        (folder / arm / "seed-0" / "settings.json").write_text(json.dumps(settings))
    page, _ = render_lab(read_lab_runs(folder))
    table = page[page.index('<table id="differences"') :].split("</table>")[0]
    assert re.findall(r'data-label="Setting">(\w+)<', table) == ["beta"]
    assert re.findall(r'data-label="sft">(.*?)<', table) == ["–"]


def test_accuracies_with_student_intervals(fake_lab):
    folder = fake_lab({"rl": {"steps": 5}, "sft": {"steps": 5}})
    for arm, values in {"rl": (0.5, 0.6, 0.7), "sft": (0.4, 0.45, 0.65)}.items():
        for seed, value in enumerate(values):
            summary = {"accuracy_after": value, "accuracy_strict_after": value}
            (folder / arm / f"seed-{seed}" / "summary.json").write_text(json.dumps(summary))
    rl, sft = read_lab_runs(folder).arms
    assert arm_rows([rl])[0][3].translate(PLAIN) == "60.0 % (35.2 to 84.8)"  # 4.303 × 0.1 / √3
    differences = seed_differences(rl, sft)
    assert differences.values == pytest.approx((-0.1, -0.15, -0.05))
    row = [cell.translate(PLAIN) for cell in paired_rows([rl, sft])[0]]
    # Mean -10.0 points, standard deviation 5, half width 4.303 × 5 / √3 = 12.4; t = -3.464, p = 0.0742.
    assert row[:5] == ["sft", "-10.0", "-22.4 to +2.4", "0.074", "3"]


def test_questions_are_paired_by_row_and_averaged_over_seeds(fake_lab):
    folder = fake_lab({"a": {"steps": 5}, "b": {"steps": 5}}, seeds=(0, 1))
    answers = {
        "a": ({1: True, 2: False, 3: False, 9: True}, {1: True, 2: False, 3: True}),
        "b": ({1: True, 2: True, 3: False, 8: True}, {1: False, 2: True, 3: True}),
    }
    for arm, by_seed in answers.items():
        for seed, rows in enumerate(by_seed):
            table = pa.table({"row_id": list(rows), "correct": list(rows.values()), "length": [1] * len(rows)})
            pq.write_table(table, folder / arm / f"seed-{seed}" / "evals" / "after.parquet")
    a, b = read_lab_runs(folder).arms
    assert sorted(question_differences(a, b).values) == [-0.5, 0.0, 1.0]


def test_evaluations_before_and_after(fake_lab):
    folder = fake_lab({"rl": {"steps": 5}}, seeds=(0, 1))
    for place, refused in {"seed-0/evaluations/moss-before": 0.2, "seed-0/evaluations/moss-after": 0.3,
                           "seed-1/evaluations/moss-after": 0.5}.items():  # fmt: skip
        evals = folder / "rl" / place / "evals"
        evals.mkdir(parents=True)
        (evals / "mossbench.json").write_text(json.dumps({"benign": {"total": {"value": refused}}, "contrast": None}))
    (row,) = evaluation_rows(read_lab_runs(folder).arms)
    # Changes 10 and 30 points: mean 20, half width 12.706 × 14.14 / √2 = 127.1.
    told = ["rl", "moss", "refused of benign questions", "20.0 %", "40.0 %", "+20.0 (-107.1 to +147.1)", "2"]
    assert [cell.translate(PLAIN) for cell in row] == told
