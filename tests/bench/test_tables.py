"""The READMEs' tables say what the newest results say."""

import json
import sys
from pathlib import Path

import pytest
import tables

STEP = {"step_seconds": {"median": 2.125}, "phases": {}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with pages of one table each, and no results but a demo's."""
    for page, name in zip(tables.PAGES, ("gpu", "kernels", "scaling"), strict=True):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n<!-- bench:{name} -->\nold\n<!-- /bench -->\nafter\n")
    (tmp_path / "results").mkdir()
    return tmp_path


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--root", str(root), "--results", str(root / "results"), *flags])
    return tables.main()


def write_suite(root: Path, name: str, date: str, milliseconds: float, status: str = "passed") -> None:
    stages = {
        "step": {"status": "passed", "figures": STEP, "ratios": {}},
        "sync": {"status": status, "figures": {"ms": milliseconds}, "ratios": {}},
    }
    record = {
        "bench": "suite",
        "device": "NVIDIA H200",
        "scale": "full",
        "date": date,
        "commit": "abc",
        "stages": stages,
    }
    (root / "results" / name).write_text(json.dumps(record))


def test_the_tables_in_this_tree_are_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().out


def test_a_stale_table_is_found_and_rewritten(root, monkeypatch):
    assert run(root, monkeypatch, "--check") == 1
    assert "old" in (root / "README.md").read_text(), "a check changes nothing"
    assert run(root, monkeypatch) == 0
    assert run(root, monkeypatch, "--check") == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n<!-- bench:gpu -->\n| Qwen2-VL-2B")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "| weight sync | ≤ 5 ms | not measured yet |" in text


def test_the_newest_gpu_results_fill_the_table(root, monkeypatch):
    write_suite(root, "h200-b.json", "2026-11-20T10:00:00", 9.0)
    write_suite(root, "h200-a.json", "2026-11-21T10:00:00", 4.0)
    run(root, monkeypatch)
    text = (root / "README.md").read_text()
    assert "| the paper's step, 8 prompts × 8 × 700 tokens | ≤ 2.2 s | 2.12 s |" in text
    assert "| weight sync | ≤ 5 ms | 4.0 ms |" in text
    assert "NVIDIA H200" in text
    assert "Nothing has been measured" not in text
    assert "h200-a.json" in text
    assert "not measured yet" in text, "decode was not"


def test_figures_of_a_stage_that_failed_are_not_told(root, monkeypatch):
    write_suite(root, "h200.json", "2026-11-21T10:00:00", 4.0, status="failed")
    run(root, monkeypatch)
    assert "| weight sync | ≤ 5 ms | not measured yet |" in (root / "README.md").read_text()


def test_a_row_takes_the_newest_record_that_holds_its_figure(root, monkeypatch):
    (root / "README.md").write_text("<!-- bench:cpu -->\n<!-- /bench -->\n")
    for date, ratios in (("2026-11-20", {"step_time_vs_trl": 4.5}), ("2026-11-21", {"step_time_vs_plain": 6.0})):
        record = {"bench": "bench_step", "device": "cpu: some", "date": date, "ratios": ratios, "figures": {}}
        (root / "results" / f"step-{date}.json").write_text(json.dumps(record))
    (root / "results" / "baseline.json").write_text('{"ratios": {}}')
    run(root, monkeypatch)
    text = (root / "README.md").read_text()
    assert "beta 0.04 ([record](bench/results/step-2026-11-20.json)) | TRL 1.16 | **4.50** | |" in text
    assert "| rollout, the same sizes | HF `generate` | not measured yet | |" in text


def test_an_unknown_table_is_told(root, monkeypatch):
    (root / "README.md").write_text("<!-- bench:speed -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="bench:speed is no table"):
        run(root, monkeypatch)
