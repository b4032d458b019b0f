"""When the gate on ratios lets a run through, and when not; no timing here."""

import json
import sys

import gate
import pytest


def benchmark(group: str, role: str, fastest: float) -> dict[str, object]:
    stats = {"min": fastest, "median": 10 * fastest}
    return {"group": group, "extra_info": {"role": role} if role else {}, "stats": stats}


RUN = [
    benchmark("update", gate.OURS, 0.5),
    benchmark("update", gate.REFERENCE, 2.0),
    benchmark("head", gate.PEER, 0.1),
    benchmark("head", gate.REFERENCE, 1.0),
    benchmark("head", gate.OURS, 1.0),
    benchmark("alone", gate.OURS, 1.0),
    benchmark("unnamed", "", 1.0),
]


def test_a_ratio_is_of_the_fastest_rounds_of_one_run():
    assert gate.ratios_of(RUN) == {"update": 4.0, "head": 1.0}


@pytest.mark.parametrize(
    ("ratio", "baseline", "passed", "told"),
    [
        (4.0, 4.0, True, "kept"),
        (2.7, 4.0, True, "kept"),
        (2.6, 4.0, False, "LOST"),
        (9.0, 4.0, True, "kept"),
        (None, 4.0, False, "not measured"),
        (4.0, None, True, "new"),
        (float("nan"), 4.0, False, "LOST"),
    ],
)
def test_a_ratio_may_fall_by_the_tolerance(ratio, baseline, passed, told):
    (verdict,) = gate.verdicts(
        {} if ratio is None else {"update": ratio}, {} if baseline is None else {"update": baseline}, tolerance=1.5
    )
    assert (verdict.passed, verdict.text) == (passed, told)


@pytest.mark.parametrize(("committed", "code"), [(4.5, 0), (6.5, 1)])
def test_the_exit_code_says_so(committed, code, tmp_path, monkeypatch, capsys):
    run, baseline = tmp_path / "run.json", tmp_path / "baseline.json"
    run.write_text(json.dumps({"benchmarks": RUN}))
    baseline.write_text(json.dumps({"ratios": {"update": committed}}))
    monkeypatch.setattr(sys, "argv", ["gate.py", str(run), "--baseline", str(baseline), "--device", "cpu"])
    assert gate.main() == code
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["checks"] == {"update kept": code == 0, "head kept": True}
    assert record["checks_passed"] == (code == 0)


def test_a_baseline_is_accepted_and_then_kept(tmp_path, monkeypatch):
    run, baseline = tmp_path / "run.json", tmp_path / "ratios.json"
    run.write_text(json.dumps({"benchmarks": RUN}))
    arguments = ["gate.py", str(run), "--baseline", str(baseline), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--accept"])
    assert gate.main() == 0
    assert json.loads(baseline.read_text())["ratios"] == {"update": 4.0, "head": 1.0}
    monkeypatch.setattr(sys, "argv", arguments)
    assert gate.main() == 0


@pytest.mark.parametrize("flags", [["missing.json"], ["RUN", "--tolerance", "0.5"]])
def test_mistakes_are_told(flags, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"benchmarks": RUN}))
    monkeypatch.setattr(sys, "argv", ["gate.py", *(str(run) if flag == "RUN" else flag for flag in flags)])
    with pytest.raises(SystemExit) as exit_:
        gate.main()
    assert exit_.value.code == 2
    assert flags[-1] in capsys.readouterr().err
