"""The page as a whole: what it must say, must not load, and must survive."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fastgrpo.report.page import write_report

FakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "hr", "link", "input"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


def table_of(page: str, name: str) -> dict[str, list[str]]:
    """Rows of the table with that id by their first cell, tags stripped."""
    body = page[page.index(f'<table id="{name}"') :]
    rows = re.findall(r"<tr>(.*?)</tr>", body[: body.index("</table>")], re.DOTALL)
    cells = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]
    return {row[0]: row[1:] for row in cells}


class WellFormed(HTMLParser):
    """Raises when tags do not close in order; collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.pictures_without_alt = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, dict(attrs))

    def note(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.loads += [str(attrs[name]) for name in ("src", "href", "xlink:href", "data", "srcset") if name in attrs]
        self.ids += [str(attrs["id"])] if "id" in attrs else []
        self.pictures_without_alt += tag == "img" and not attrs.get("alt")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> WellFormed:
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_headline_figures_equal_the_files(fake_run: FakeRun) -> None:
    folder = fake_run()
    page = text_of(write_report([folder]))
    summary = json.loads((folder / "summary.json").read_text())
    for name in (
        "accuracy_before",
        "accuracy_after",
        "accuracy_strict_before",
        "accuracy_strict_after",
        "unreadable_rate_before",
        "unreadable_rate_after",
        "answered_accuracy_before",
        "answered_accuracy_after",
        "answered_accuracy_shuffled_images",
        "pass_at_8_before",
    ):
        assert f">{100 * summary[name]:.1f} %<" in page, name
    assert "chance 43.8 %" in page
    assert "<dt>wall time</dt><dd>57 min 1 s</dd>" in page
    assert "<dt>tokens / s</dt><dd>6,120</dd>" in page
    assert "<dt>steps</dt><dd>60</dd>" in page
    assert "pass@8 before training" in page
    assert "Guessing gets 97.2 %." in page
    assert "95 % intervals 29.6 to 33.2 → " in page
    assert "n = 2,638." in page
    assert "<dt>hardware</dt><dd>EPYC, 2 threads</dd>" in page
    assert "<dt>date</dt><dd>2026-11-26 03:50 UTC</dd>" in page
    assert "<dt>commit</dt><dd>abc1234</dd>" in page
    assert "<dt>versions</dt><dd>python 3.11.7, torch 2.13.0</dd>" in page


def test_task_table_equals_the_files(fake_run: FakeRun) -> None:
    folder = fake_run()
    rows = table_of(text_of(write_report([folder])), "tasks")
    summary = json.loads((folder / "summary.json").read_text())
    scores = {name: json.loads((folder / f"evals/{name}.json").read_text()) for name in ("before", "after")}
    for task, change in summary["accuracy_by_task"].items():
        expected = [change["chance"], change["before"], change["after"]]
        for score in scores.values():
            by_task = score["accuracy_by_task"][task]
            expected += [by_task["answered_rate"], by_task["answered_accuracy"]]
        assert rows[task] == [str(change["count"]), *(f"{100 * value:.1f} %" for value in expected)]


def test_span_table_sums_to_the_step_time(fake_run: FakeRun) -> None:
    folder = fake_run()
    rows = table_of(text_of(write_report([folder])), "spans")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    total = sum(step["step_time"] for step in steps)
    for label, metric in (("rollout", "time/rollout"), ("generate", "time/rollout/generate")):
        assert rows[label][1] == f"{100 * sum(step[metric] for step in steps) / total:.1f} %"
    outermost = [rows[name][1] for name in ("rollout", "reward", "update/forward", "update/backward", "other")]
    assert sum(float(share.removesuffix(" %")) for share in outermost) == pytest.approx(100, abs=0.3)


def test_is_self_contained_and_well_formed(fake_run: FakeRun) -> None:
    runs = [fake_run(f"run{seed}", seed=seed) for seed in range(2)]
    for page in (text_of(write_report(runs[:1])), text_of(write_report(runs, runs[0].parent / "both.html"))):
        parser = parse(page)
        assert parser.loads
        assert all(load.startswith(("#", "data:image/jpeg;base64,")) for load in parser.loads)
        assert set(re.findall(r"https?://[^\s\"'<>)]*", page)) <= {"http://www.w3.org/2000/svg"}
        assert "@import" not in page
        assert "<script" not in page
        assert parser.pictures_without_alt == 0
        assert len(parser.ids) == len(set(parser.ids))
        references = set(re.findall(r"url\(#([^)]*)\)", page)) | {load[1:] for load in parser.loads if load[0] == "#"}
        assert references <= set(parser.ids)


def test_each_chart_has_alternative_text(fake_run: FakeRun) -> None:
    page = text_of(write_report([fake_run()]))
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', page)
    assert len(labels) == page.count("<figure") == page.count("<figure>\n  <h3>") == 10
    assert any(label.startswith("Response length against optimizer step. mean: 9") for label in labels)


def test_model_text_is_escaped(fake_run: FakeRun) -> None:
    folder = fake_run()
    attack = '<script>alert("x")</script><img src=x onerror=alert(1)></pre>\x1b[31m\u202e'
    for file in [*folder.glob("completions/*.parquet"), *folder.glob("evals/*.parquet")]:
        table = pq.read_table(file)
        rows = [
            {**row, "completion": attack, "prompt": attack, "solution": attack, "task": attack}
            for row in table.to_pylist()
        ]
        pq.write_table(table.from_pylist(rows, schema=table.schema), file)
    summary = json.loads((folder / "summary.json").read_text())
    summary["accuracy_by_task"] = {attack + "$x_{": {"before": 0.1, "after": 0.2, "chance": 0.5, "count": 3}}
    summary["accuracy_by_task"]["plain"] = summary["accuracy_by_task"][attack + "$x_{"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "settings.json").write_text(json.dumps({"model_name_or_path": attack, attack: attack}))
    page = text_of(write_report([folder]))
    parser = parse(page)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;") > 10
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert all(load.startswith(("#", "data:")) for load in parser.loads)


def test_gauges_have_intervals_and_the_number_of_questions(fake_run: FakeRun) -> None:
    page = text_of(write_report([fake_run()]))
    rows = page.split('<div class="taskname">')[1:]
    assert [row.split("</div>")[0] for row in rows] == [
        *(f"{task} <span>n = 650</span>" for task in ("Count", "Relation", "Depth", "Distance")),
        "All questions <span>n = 2,638</span>",
    ]
    low, width = map(float, re.findall(r'<u class="before" style="left:([\d.]+)%;width:([\d.]+)%">', rows[-1])[0])
    assert (low, low + width) == (pytest.approx(29.6, abs=0.05), pytest.approx(33.2, abs=0.05))


def test_nothing_is_guessed_where_questions_have_no_options(fake_run: FakeRun) -> None:
    folder = fake_run(chance=0.0)
    for file in (folder / "summary.json", folder / "evals/before.json", folder / "evals/after.json"):
        record = json.loads(file.read_text())
        for row in record["accuracy_by_task"].values():
            row["chance"] = 0.0
        file.write_text(json.dumps(record))
    page = text_of(write_report([folder]))
    assert "chance –" in page
    assert '<i class="chance"' not in page
    assert {row[1] for name, row in table_of(page, "tasks").items() if name != "Question type"} == {"–"}


def test_different_questions_are_not_called_the_same(fake_run: FakeRun) -> None:
    same = text_of(write_report([fake_run("same", steps=20)]))
    assert "The same questions, early and late" in same
    assert "different questions" not in same
    different = text_of(write_report([fake_run("different", steps=20, repeat_rows=False)]))
    assert "The same questions, early and late" not in different
    assert "They are different questions" in different


def test_several_runs_mean_and_std(fake_run: FakeRun, tmp_path: Path) -> None:
    after = [0.50, 0.56, 0.62]
    runs = [fake_run(f"seed{i}", seed=i, accuracy_after=value, steps=20) for i, value in enumerate(after)]
    page = text_of(write_report(runs, tmp_path / "all.html"))
    rows = table_of(page, "runs")
    assert rows["Accuracy after"] == ["50.0 %", "56.0 %", "62.0 %", "56.0 ± 6.0 %"]
    assert rows["Accuracy before"][-1] == "31.4 %"
    assert rows["pass@8 before"][-1] == "87.2 %"
    assert "<dt>seeds</dt><dd>0, 1, 2</dd>" in page
    assert "All runs agree." in page
    assert "differ in more than their seed" not in page


def test_says_in_which_settings_runs_differ(fake_run: FakeRun, tmp_path: Path) -> None:
    runs = [fake_run(f"seed{i}", seed=i, steps=20) for i in range(2)]
    settings = json.loads((runs[1] / "settings.json").read_text())
    (runs[1] / "settings.json").write_text(json.dumps({**settings, "reward_funcs": ["format"]}))
    page = text_of(write_report(runs, tmp_path / "both.html"))
    assert "differ in more than their seed" in page
    told = ["[&#34;accuracy&#34;, &#34;format&#34;]", "[&#34;format&#34;]"]
    assert table_of(page, "differences") == {"Setting": ["seed0", "seed1"], "reward_funcs": told}


def test_access_tokens_stay_out(fake_run: FakeRun) -> None:
    folder = fake_run(steps=3)
    (folder / "settings.json").write_text(json.dumps({"hub_token": "hf_abc", "hub_model_id": "me/mine", "seed": 1}))
    page = text_of(write_report([folder]))
    assert "hf_abc" not in page
    assert "me/mine" in page


def test_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "settings.json").write_text('{"seed": 3}')
    monkeypatch.chdir(tmp_path)
    assert write_report([one]) == one / "report.html"
    assert write_report([one, two]) == Path("report.html")
    assert (tmp_path / "report.html").is_file()
    assert write_report([one], tmp_path / "new" / "page.html").is_file()
    assert write_report([one], two) == two / "report.html"


def test_no_usable_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder given"):
        write_report([])
    with pytest.raises(ValueError, match=r"'.*nowhere' does not exist") as error:
        write_report([tmp_path / "nowhere"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds nothing to report on"):
        write_report([tmp_path])


@pytest.mark.parametrize("kept", ["settings.json", "metrics.jsonl", "completions", "evals", "summary.json"])
def test_any_single_file_makes_a_page(fake_run: FakeRun, kept: str, tmp_path: Path) -> None:
    folder = fake_run(steps=12)
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / kept).rename(alone / kept)
    page = text_of(write_report([alone]))
    parse(page)
    others = {"settings.json", "metrics.jsonl", "completions/", "evals/before.json", "summary.json"} - {
        kept,
        f"{kept}/",
    }
    for other in others if kept != "evals" else others - {"evals/before.json"}:
        assert f"<li>{other} " in page


def test_a_run_killed_half_way(fake_run: FakeRun) -> None:
    folder = fake_run(steps=30, repeat_rows=False)
    for name in ("summary.json", "evals/after.json", "evals/after.parquet"):
        (folder / name).unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    broken = folder / "completions/completions_00020.parquet"
    broken.write_bytes(broken.read_bytes()[:200])
    page = text_of(write_report([folder]))
    parse(page)
    assert "<dt>steps</dt><dd>29</dd>" in page
    assert "metrics.jsonl: 1 line cut off or unreadable" in page
    assert "evals/after.json is not there" in page
    assert "completions/completions_00020.parquet could not be read" in page
    assert str(folder) not in page.split("</aside>")[0]
    assert "Not known yet" in page
    assert "31.4 %" in page


def test_a_single_step_and_no_pictures(fake_run: FakeRun) -> None:
    folder = fake_run(steps=1)
    for file in [*folder.glob("completions/*.parquet"), *folder.glob("evals/*.parquet")]:
        pq.write_table(pq.read_table(file).drop_columns(["thumbnail"]), file)
    page = text_of(write_report([folder]))
    parse(page)
    assert "no picture kept" in page
    assert "data:image" not in page


def test_broken_json_and_odd_values(fake_run: FakeRun) -> None:
    folder = fake_run(steps=5)
    (folder / "summary.json").write_text("[1, 2]")
    (folder / "evals/after.json").write_text('{"accuracy": NaN, "accuracy_by_task": null, "pass_at_k": 3, "step": "x"}')
    (folder / "evals/extra.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward": null, "kl": NaN, "entropy": "high"}\n\n[]\n{"reward": 3}\n')
    page = text_of(write_report([folder]))
    parse(page)
    assert "summary.json could not be read (not a JSON object)" in page
    assert "evals/extra.json could not be read" in page
    assert "metrics.jsonl: 2 lines cut off or unreadable" in page


def test_early_and_late_stand_side_by_side(fake_run: FakeRun) -> None:
    page = text_of(write_report([fake_run(steps=30)]))
    assert page.count('<div class="kind">Count</div>') >= 1
    assert "Early <span>step 1 · first 2 of 8 completions</span>" in page
    assert "Late <span>step 30 · first 2 of 8 completions</span>" in page
    assert "How many red balls are there?" in page
    assert "<|image_pad|>" not in page
    assert "&lt;|image_pad" not in page
    assert '<span class="tag answer">&lt;answer&gt;</span><b class="answer">' in page
    assert "<mark>Wait</mark>, <mark>let me check" in page


def test_half_a_surrogate_pair_in_names_and_texts(fake_run: FakeRun) -> None:
    folder = fake_run(steps=3)
    for name in ("before", "after"):
        file = folder / "evals" / f"{name}.json"
        file.write_text(file.read_text().replace("Relation", "Rel\\ud800ation"))
    (folder / "settings.json").write_text(json.dumps({"run_name": "\ud800", "\udfff": "a\ud800"}))
    assert "ation" in write_report([folder]).read_text(encoding="utf-8")


def test_pages_forbid_everything_but_their_own_styles_and_pictures(fake_run: FakeRun) -> None:
    page = text_of(write_report([fake_run(steps=3)]))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert "<script" not in page
