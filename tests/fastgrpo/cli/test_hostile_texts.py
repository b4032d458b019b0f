"""Texts that would act if they were let reach page, terminal and log inert: in names, columns, prompts and answers."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastgrpo.cli.main import main

INJECTIONS = [
    "<evil>", "</title><evil>", "</style><evil>", "</script><script evil>", "--><evil>", "]]><evil>", "</svg><evil>",
    "</text><evil>", "</textarea><evil>", '"><evil>', "'><evil>", '" evil="1', "' evil='1", "` evil=`",
    "<svg onload=evil()>", "<img src=x onerror=evil()>", "<a href=javascript:evil()>", "&lt;evil&gt;",
    "{{ 7 * 7 }}evil", "url(evil)}body{evil",
    "\x1b[2J\x1b]0;evil\x07", "\x9b31mevil", "\x1b]8;;http://evil\x1b\\evil", "[red]evil[/b]",
    "[link=http://evil]", "a\u202eevil", "evil\ud800", "evil\x00", "$\\evil_{", "\revil",
]  # fmt: skip
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


class Elements(HTMLParser):
    """Names of a page's elements, and their attributes with values."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}


def is_inert(page: str) -> bool:
    elements = Elements(page)
    names = {name for name, _ in elements.attributes}
    links = [value for name, value in elements.attributes if name in ("href", "src", "xlink:href", "action", "style")]
    loads = [value for value in links if "evil" in value or value.startswith(("javascript:", "http:"))]
    acts = [name for name in names if name.startswith("on") or "evil" in name]
    found = elements.names & {"evil", "script", "iframe", "object", "embed", "form", "link", "base"}
    return not (
        loads or acts or found or ACTS.search(page) or "}body{" in "".join(re.findall("<style>.*?</style>", page))
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Text rows with all of it in every column, names of columns too; one of them is bad."""
    everything = " ".join(INJECTIONS).replace("\ud800", "")  # which Arrow refuses
    row = {"prompt": everything, "solution": "a", "task": everything}
    row |= {text: everything for text in INJECTIONS if "\u202e" in text or "<" in text}
    file = tmp_path / "\x1b[2J[red]<evil>rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [row, row, row, row | {"prompt": ""}]))
    return file


def test_through_a_run(
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "\x1b]0;evil\x07<evil>[red]"
    rewards = tmp_path / "rewards.py"
    names = ", ".join(map(ascii, INJECTIONS))
    rewards.write_text(
        "def f(completions, log_extra, log_metric, **_):\n"
        f"    for name in ({names}):\n"
        "        log_extra(name, [name] * len(completions))\n"
        "        log_metric(name, 1.0)\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    flags = {
        "model_name_or_path": tiny_model_dir, "dataset_name": rows, "output_dir": out, "reward_funcs": "rewards:f",
        "run_name": "".join(INJECTIONS).replace("\x00", ""), "num_generations": 2, "per_device_train_batch_size": 8,
        "max_completion_length": 3, "max_steps": 1, "use_cpu": "true", "num_completions_to_print": 1,
        "logging_steps": 1, "eval_dataset_name": rows, "eval_max_new_tokens": 3, "report_to": "tensorboard",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert main(["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 0
    assert main(["report", str(out), str(out), "--out", str(tmp_path / "both.html")]) == 0
    told = "".join([*capfd.readouterr(), *caplog.messages])
    assert not ACTS.search(told.replace("\n", ""))
    assert is_inert((out / "report.html").read_text())
    assert is_inert((tmp_path / "both.html").read_text())
    assert "evil" in (out / "report.html").read_text()


def test_through_an_evaluation(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_new_tokens", "2", "--output_dir", str(tmp_path), "--name", "<evil>\x1b[2J", "--device", "cpu"]
    assert main(["eval", str(tiny_model_dir), str(rows), *flags]) == 0
    assert not ACTS.search("".join(capfd.readouterr()).replace("\n", ""))
    (page,) = tmp_path.glob("*.html")
    assert is_inert(page.read_text())


@pytest.mark.parametrize("text", INJECTIONS)
def test_in_a_line_about_a_mistake(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dataset_name", f"./{text}", "--model_name_or_path", f"./{text}", "--use_cpu", text]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert not ACTS.search(line.strip())
