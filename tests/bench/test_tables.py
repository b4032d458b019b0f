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
    for page, name in zip(tables.PAGES, ("gpu", "kernels", "scaling", "families"), strict=True):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n<!-- bench:{name} -->\nold\n<!-- /bench -->\nafter\n")
    (tmp_path / "results").mkdir()
    return tmp_path


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--root", str(root), "--results", str(root / "results"), *flags])
    return tables.main()


def write_suite(
    root: Path, name: str, date: str, milliseconds: float, status: str = "passed", device: str = "NVIDIA H200"
) -> None:
    stages = {
        "step": {"status": "passed", "figures": STEP, "ratios": {}},
        "sync": {"status": status, "figures": {"ms": milliseconds}, "ratios": {}},
    }
    record = {
        "bench": "suite",
        "device": device,
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
    assert "beta 0.04 ([record](bench/results/step-2026-11-20.json)) | TRL 1.16 | – | – | **4.50** | – | |" in text
    assert "| rollout, the same sizes | HF `generate` | | | not measured yet | | |" in text


def test_a_ratio_stands_with_its_size_threads_and_spread(root, monkeypatch):
    (root / "README.md").write_text("<!-- bench:cpu -->\n<!-- /bench -->\n")
    step = {"parameters": 3_540_736, "speedup": {"median": 4.3, "low": 4.081, "high": 4.697}}
    update = {"parameters": 3_667_328, "ragged": {"packed_spread": 0.126, "naive_spread": 0.085}}
    for bench, ratios, figures in (
        ("bench_step", {"step_time_vs_trl": 4.3}, step),
        ("bench_update", {"time_vs_naive_ragged": 5.4}, update),
    ):
        record = {"bench": bench, "device": "cpu: AMD EPYC, 2 threads", "ratios": ratios, "figures": figures}
        (root / "results" / f"{bench}.json").write_text(json.dumps(record))
    run(root, monkeypatch)
    text = (root / "README.md").read_text()
    assert "| TRL 1.16 | 3.5 M | 2 | **4.30** | 4.08 … 4.70 | |" in text
    assert "| padded batch | 3.7 M | 2 | **5.40** | 13 % : 8 % | |" in text


def test_each_card_has_a_column_of_its_newest_figures(root, monkeypatch):
    write_suite(root, "h200.json", "2026-11-20T10:00:00", 9.0)
    write_suite(root, "h100-a.json", "2026-11-21T10:00:00", 4.0, device="NVIDIA H100 80GB HBM3")
    write_suite(root, "h100-b.json", "2026-11-22T10:00:00", 3.0, status="failed", device="NVIDIA H100 80GB HBM3")
    run(root, monkeypatch)
    text = (root / "README.md").read_text()
    assert "| to reach on an H200 | one NVIDIA H100 80GB HBM3 | one NVIDIA H200 |" in text
    assert "| weight sync | ≤ 5 ms | 4.0 ms | 9.0 ms |" in text
    assert "NVIDIA H100 80GB HBM3: [record of 2026-11-22](bench/results/h100-b.json), commit abc, [record" in text
    kernels = (root / "kernels" / "README.md").read_text()
    assert "| one NVIDIA H100 80GB HBM3: head, forward + backward" in kernels


def test_the_first_lines_say_what_a_gpu_did(root, monkeypatch):
    (root / "README.md").write_text("<!-- bench:gpu-state -->\n<!-- /bench -->\n")
    run(root, monkeypatch)
    assert "**Nothing has been measured on a GPU yet.**" in (root / "README.md").read_text()
    first = {
        "bench": "first_step",
        "device": "NVIDIA H100 80GB HBM3",
        "date": "2026-11-26",
        "commit": "d53",
        "figures": {"step_s": [6.866, 7.1, 6.891]},
    }
    (root / "results" / "h100-first-step.json").write_text(json.dumps(first))
    run(root, monkeypatch)
    text = (root / "README.md").read_text()
    assert "took 6.9 s on one NVIDIA H100 80GB HBM3 as first written" in text
    assert "no figure is in yet" in text
    write_suite(root, "h100.json", "2026-11-27T10:00:00", 4.0, device="NVIDIA H100 80GB HBM3")
    run(root, monkeypatch)
    text = (root / "README.md").read_text()
    assert "takes 2.1 s on one NVIDIA H100 80GB HBM3 ([record of 2026-11-27](bench/results/h100.json)" in text
    assert "it took 6.9 s" in text
    assert "no figure is in yet" not in text


def test_an_unknown_table_is_told(root, monkeypatch):
    (root / "README.md").write_text("<!-- bench:speed -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="bench:speed is no table"):
        run(root, monkeypatch)
