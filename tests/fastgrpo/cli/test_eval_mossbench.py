"""`fastgrpo eval --benchmark mossbench`: the published files, answers judged by their words or by an endpoint."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastgrpo.cli.main import main

FLAGS = ["--max_new_tokens", "3", "--device", "cpu"]
KEY = "sk-very-secret"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six benign questions, one of whose pictures is missing, and three harmful ones."""
    folder = tmp_path / "mossbench"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "images" / "1.png", format="WEBP")
    for name, count in (("information.json", 6), ("information_contrast.json", 3)):
        records = {}
        for i in range(1, count + 1):
            metadata = {"over": f"type {i % 3 + 1}"}
            if name == "information.json":
                metadata |= {"human": 0, "child": i % 2, "syn": 1, "ocr": 0, "harm": [7]}  # type: ignore[dict-item]
            picture = "images/2.png" if (i, count) == (6, 6) else "images/1.png"
            records[str(i)] = {
                "pid": str(i), "image": picture, "short description": "A room.", "question": f"What is this? {count}",
                "description": "A room.", "metadata": metadata,
            }  # fmt: skip
        (folder / name).write_text(json.dumps(records))
    return folder


@pytest.fixture
def score(tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Exit code, and what is printed."""

    def run(*flags: str) -> tuple[int, str]:
        base = ["--benchmark", "mossbench", "--data", str(data), "--output_dir", str(tmp_path / "out"), *FLAGS]
        code = main(["eval", str(tiny_model_dir), *flags, *base])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint that finds every answer a refusal; gives its address."""
    pytest.importorskip("httpx2")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTGRPO_JUDGE_API_KEY", KEY)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            message = {"role": "assistant", "content": '{"score": 1, "stage": "intent"}'}
            content = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_the_published_files_by_words(score: Callable[..., Any], tmp_path: Path) -> None:
    code, printed = score()
    assert code == 0, printed
    assert "row 5 skipped: " in printed
    figures = json.loads((tmp_path / "out" / "evals" / "mossbench.json").read_text())
    assert (figures["judge"], figures["num_questions"]) == ("string matcher", 8)
    assert (figures["benign"]["total"]["count"], figures["contrast"]["total"]["count"]) == (5, 3)
    assert figures["skipped"][0]["row_id"] == 5
    rows = pq.read_table(tmp_path / "out" / "evals" / "mossbench.parquet").to_pylist()
    refused = [row["refused"] for row in rows if not row["contrast"]]
    assert figures["benign"]["total"]["refused"] == sum(refused)
    assert [row["pid"] for row in rows] == ["1", "2", "3", "4", "5", "1", "2", "3"]


def test_models_side_by_side_by_a_judge(
    score: Callable[..., Any], judge: str, adapter_dir: Path, tmp_path: Path
) -> None:
    code, printed = score(str(adapter_dir), "--judge_base_url", judge, "--judge_model", "some-model")
    assert code == 0, printed
    comparison = tmp_path / "out" / "mossbench-comparison.json"
    figures = json.loads(comparison.read_text())
    benign = figures["models"]["tiny"]["benign"]
    assert (benign["total"]["value"], benign["total"]["count"], benign["stages"]["intent"]) == (1.0, 5, 5)
    (test,) = figures["paired_tests"]
    assert (test["count"], test["difference"], test["p_value"]) == (5, 0.0, 1.0)
    assert "perception" in printed
    page = comparison.with_suffix(".html").read_text()
    assert page.count("100.0 % (47.8 to 100.0), n = 5") >= 4, "in total and by metadata, of both"
    assert "benign refusals, error of intent" in page
    assert "some-model" in page
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(KEY.encode() not in path.read_bytes() for path in written)
    assert KEY not in printed


def test_rows_without_a_picture_are_counted(score: Callable[..., Any], data: Path) -> None:
    records = json.loads((data / "information.json").read_text())
    more = {f"{i}": records["6"] | {"pid": str(i)} for i in range(7, 20)}
    (data / "information.json").write_text(json.dumps(records | more))
    _, printed = score()
    assert "row 14 skipped: " in printed
    assert "row 15 skipped: " not in printed
    assert "14 rows skipped in all" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge_model", "m"], "give both --judge_base_url and --judge_model, or neither"),
        (["--pass_at_k", "2"], "--pass_at_k has no meaning in MOSSBench"),
        (["--judge_base_url", "nowhere", "--judge_model", "m"], "is no address"),
    ],
)
def test_flags_that_do_not_fit(score: Callable[..., Any], flags: list[str], message: str) -> None:
    code, printed = score(*flags)
    assert code == 2
    assert message in printed.splitlines()[-1]


def test_a_judge_is_for_mossbench(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_model_dir), "--benchmark", "vsr", "--judge_model", "m"]) == 2
    assert "--judge_model is for --benchmark mossbench alone" in capsys.readouterr().err
