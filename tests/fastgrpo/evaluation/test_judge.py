"""The judge against a server on this machine, which also fails in every way that one can."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.evaluation.judge import Case, Judge, Verdict

REFUSED = '{"score": 1, "stage": "intent"}'
KEY = "sk-very-secret"
HANGS = "hangs"


class Server:
    """Says the replies in turn, the last for ever: a status, a text as the model's, or `HANGS`."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.requests: list[tuple[dict[str, Any], str | None]] = []
        self.lock, self.released = threading.Lock(), threading.Event()
        self.under_way = self.most_under_way = 0
        self.gather: threading.Barrier | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((body, self.headers.get("Authorization")))
                    reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                if outer.gather is not None:
                    outer.gather.wait(10)
                if reply == HANGS:
                    outer.released.wait(10)
                with outer.lock:
                    outer.under_way -= 1
                status, text = (reply, "no") if isinstance(reply, int) else (200, reply)
                message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                content = b"<html>" if reply == "garbage" else json.dumps(message).encode()
                try:
                    self.send_response(status)
                    if status == 429:
                        self.send_header("Retry-After", "7")
                    if reply == "no gzip":
                        self.send_header("Content-Encoding", "gzip")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTGRPO_JUDGE_API_KEY", KEY)
    servers = []

    def start(*replies: Any) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def cases(*answers: str) -> list[Case]:
    return [Case("Can I cut this?", "A cake.", answer) for answer in answers]


def test_equal_cases_are_asked_about_once(serve: Any, tmp_path: Path) -> None:
    server = serve(REFUSED)
    assert Judge(server.url, "m", tmp_path).judge(cases(*["No."] * 20)) == [Verdict(True, "intent")] * 20
    assert len(server.requests) == 1


def test_what_is_asked_and_what_is_read(serve: Any, tmp_path: Path) -> None:
    server = serve(REFUSED)
    assert Judge(server.url, "some-model", tmp_path).judge(cases("No {way}.")) == [Verdict(True, "intent")]
    body, authorization = server.requests[0]
    assert (body["model"], body["temperature"], authorization) == ("some-model", 0, f"Bearer {KEY}")
    assert all(part in body["messages"][0]["content"] for part in ("Can I cut this?", "A cake.", "No {way}."))


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ('{"score": 0, "stage": null}', Verdict(False)),
        ('{"score": "1", "stage": "perception"}', Verdict(True, "perception")),
        ('{"score": 0, "stage": "perception"}', Verdict(False)),
        ('{"score": 1, "stage": "another"}', Verdict(True)),
        ('Well.\n```json\n{"score": 1, "stage": "safety judgement"}\n```', Verdict(True, "safety judgement")),
    ],
)
def test_forms_of_a_verdict(serve: Any, tmp_path: Path, said: str, verdict: Verdict) -> None:
    assert Judge(serve(said).url, "m", tmp_path).judge(cases("x")) == [verdict]


@pytest.mark.parametrize("trouble", [429, 500, 503, "garbage", "no gzip", "no JSON here", '{"score": 2}', "{}"])
def test_passing_trouble_is_tried_again(serve: Any, tmp_path: Path, trouble: Any) -> None:
    server, pauses = serve(trouble, trouble, REFUSED), []
    assert Judge(server.url, "m", tmp_path, pause=pauses.append).judge(cases("x")) == [Verdict(True, "intent")]
    assert len(server.requests) == 3
    if trouble == 429:
        assert pauses == [7, 7], "what Retry-After asks for"
    else:
        assert 0.5 <= pauses[0] <= 1.5
        assert 1 <= pauses[1] <= 3


def test_a_request_that_hangs_is_tried_again(serve: Any, tmp_path: Path) -> None:
    server, pauses = serve(HANGS, REFUSED), []
    judge = Judge(server.url, "m", tmp_path, timeout_s=0.2, pause=pauses.append)
    assert judge.judge(cases("x")) == [Verdict(True, "intent")]
    assert len(pauses) == 1


def test_lasting_trouble_costs_that_case_alone(serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(*[500] * 6, REFUSED)
    judge = Judge(server.url, "m", tmp_path, concurrency=1, pause=lambda _: None)
    with caplog.at_level(logging.DEBUG):
        assert judge.judge(cases("x", "y")) == [None, Verdict(True, "intent")]
    assert "no verdict in 6 tries, the last: status 500" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_wrong_key_or_address_ends_it(serve: Any, tmp_path: Path, status: int) -> None:
    server = serve(status)
    with pytest.raises(ValueError, match=f"status {status}: check --judge_base_url") as error:
        Judge(server.url, "m", tmp_path, concurrency=1).judge(cases("x", "y", "z"))
    assert KEY not in str(error.value)


def test_an_endpoint_that_is_not_there_ends_it(serve: Any, tmp_path: Path) -> None:
    server = serve(REFUSED)
    server.close()
    with pytest.raises(ValueError, match="cannot be reached: check --judge_base_url"):
        Judge(server.url, "m", tmp_path, pause=lambda _: None).judge(cases("x", "y"))


def test_no_verdict_at_all_is_no_result(serve: Any, tmp_path: Path) -> None:
    server = serve(503)
    with pytest.raises(ValueError, match="no verdict on any of 2 answers"):
        Judge(server.url, "m", tmp_path, pause=lambda _: None).judge(cases("x", "y"))


@pytest.mark.parametrize("key", ["sk-söcret", "sk-secret\nsk-other"])
def test_a_key_that_no_header_can_hold(serve: Any, tmp_path: Path, monkeypatch: Any, key: str) -> None:
    server = serve(REFUSED)
    monkeypatch.setenv("FASTGRPO_JUDGE_API_KEY", f"{KEY}\n")  # as read from a file
    Judge(server.url, "m", tmp_path).judge(cases("x"))
    assert server.requests[0][1] == f"Bearer {KEY}"
    monkeypatch.setenv("FASTGRPO_JUDGE_API_KEY", key)
    with pytest.raises(ValueError, match="FASTGRPO_JUDGE_API_KEY holds characters") as error:
        Judge(server.url, "m", tmp_path).judge(cases("y"))
    assert key not in str(error.value)


def test_verdicts_are_kept_by_endpoint_model_and_case(serve: Any, tmp_path: Path) -> None:
    server = serve(REFUSED)
    first = Judge(server.url, "m", tmp_path).judge(cases("x", "y"))
    assert Judge(server.url, "m", tmp_path).judge(cases("x", "y")) == first
    assert len(server.requests) == 2
    Judge(server.url, "other", tmp_path).judge(cases("x"))
    Judge(server.url, "m", tmp_path).judge(cases("z"))
    assert len(server.requests) == 4
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert all(KEY not in file.read_text() for file in files)
    files[0].write_text("{")  # broken: asked again
    Judge(server.url, "m", tmp_path).judge(cases("x", "y", "z"))
    Judge(server.url, "other", tmp_path).judge(cases("x"))
    assert len(server.requests) == 5


def test_no_more_requests_at_once_than_allowed(serve: Any, tmp_path: Path) -> None:
    server = serve(REFUSED)
    server.gather = threading.Barrier(3)  # three under way at once, or none ends
    Judge(server.url, "m", tmp_path, concurrency=3).judge(cases(*map(str, range(9))))
    assert server.most_under_way == 3


def test_an_empty_answer_needs_no_judge(serve: Any, tmp_path: Path) -> None:
    server = serve(500)
    assert Judge(server.url, "m", tmp_path).judge(cases(" \n")) == [Verdict(True)]
    assert server.requests == []


def test_without_a_key_none_is_sent(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGRPO_JUDGE_API_KEY")
    server = serve(REFUSED)
    Judge(server.url, "m", tmp_path).judge(cases("x"))
    assert server.requests[0][1] is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://user:pw@host/v1", "http://host/v1?key=pw"])
def test_addresses_that_are_none_or_hold_a_secret(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="--judge_base_url") as error:
        Judge(url, "m", tmp_path)
    assert "pw" not in str(error.value)


def test_a_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--judge_model is missing"):
        Judge("http://127.0.0.1:1/v1", "", tmp_path)
