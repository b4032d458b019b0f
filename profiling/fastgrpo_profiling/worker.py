"""Runs a side of a comparison in its own process: one line of JSON requests a step, one line answers.

Separate processes keep memory apart, and each side runs its own training loop in its own environment. A worker's first
line describes it.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, Any

import torch

from fastgrpo_profiling.compare import StepRecord
from fastgrpo_profiling.kernels import KernelWatch
from fastgrpo_profiling.memory import MemoryProbe
from fastgrpo_profiling.roofline import StepWork
from fastgrpo_profiling.span import SpanRecorder, listen, record, span


class WorkerError(RuntimeError):
    """A worker ended early; the message holds the end of its output."""


class WorkerSide:
    """The requesting end: starts `command` and requests steps.

    Args:
        name: of the side.
        command: the worker's command line.
        environment: variables set for it beside this process's own.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - open as long as the worker runs
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ready(self) -> dict[str, Any]:
        """Waits until the worker is ready; returns its description of itself."""
        return self._read()

    def step(self, trace: bool) -> StepRecord:
        """Takes the next step."""
        return self._ask({"trace": trace})

    def step_inside(self, name: str, every: int) -> StepRecord:
        """Takes the next step, untimed, and profiles every `every`-th of its spans of this name (`kernels`)."""
        return self._ask({"trace": False, "inside": name, "every": every})

    def _ask(self, question: Mapping[str, Any]) -> StepRecord:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the next read reports why
        return StepRecord.from_json(self._read())

    def close(self) -> None:
        """Ends the worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise WorkerError(f"the {self.name} side ended early:\n{self._log.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class TurnTaker:
    """The answering end, inside a training loop that calls `next_step` at the start of each step.

    Args:
        asks: lines with requests.
        answers: where answers are written.
        device: whose memory and time are measured.
    """

    def __init__(self, asks: IO[str], answers: IO[str], device: str) -> None:
        self.asks, self.answers = asks, answers
        self.device = device
        self.probe = MemoryProbe(device)
        self.tokens, self.reward = 0, math.nan
        self.work: StepWork | None = None
        self.trained: StepWork | None = None
        self._block: ExitStack | None = None
        self._recorder = SpanRecorder()
        self._watch: KernelWatch | None = None
        self._start = 0.0

    def introduce(self, **facts: Any) -> None:
        """Writes the first line, which describes this side."""
        self._answer(facts)

    def note(
        self, *, tokens: int, reward: float, work: StepWork | None = None, trained: StepWork | None = None
    ) -> None:
        """Reports a rollout of the current step, its rewards, and the part with a gradient (None: all)."""
        self.tokens, self.reward = self.tokens + tokens, reward
        self.work = work if self.work is None or work is None else self.work + work
        self.trained = trained if self.trained is None or trained is None else self.trained + trained

    def next_step(self) -> None:
        """Answers for the step that ends here and waits for the next request.

        Raises:
            SystemExit: there are no more requests.
        """
        if self._block is not None:
            self._finish()
        line = self.asks.readline()
        if not line:
            raise SystemExit(0)
        question = json.loads(line)
        trace = bool(question["trace"])
        self.tokens, self.reward, self.work, self.trained = 0, math.nan, None, None
        self._recorder = SpanRecorder(
            on_device=self.device == "cuda", trace=trace, memory=self.probe if trace else None
        )
        self._block = ExitStack()
        self._synchronize()
        self._start = time.perf_counter()
        self._block.enter_context(record(self._recorder))
        self._watch = None
        if "inside" in question:
            self._watch = KernelWatch(question["inside"], self.device, question["every"])
            self._block.enter_context(listen(self._watch))
        self._block.enter_context(span("step"))

    def _finish(self) -> None:
        assert self._block is not None
        self._synchronize()
        seconds = time.perf_counter() - self._start
        self._block.close()
        self._block = None
        totals = self._recorder.totals
        step = StepRecord(
            seconds=seconds,
            tokens=self.tokens,
            reward=self.reward,
            peak_bytes=self.probe.peak(),
            own_seconds={name: total.self_seconds for name, total in totals.items()},
            span_count=sum(total.count for total in totals.values()),
            events=self._recorder.events,
            work=self.work,
            trained=self.trained,
            inside=self._watch.seconds if self._watch else {},
        )
        self._answer(asdict(step))

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _answer(self, fields: Mapping[str, Any]) -> None:
        self.answers.write(json.dumps(fields) + "\n")
        self.answers.flush()


def claim_stdout() -> IO[str]:
    """Reserves standard output for answers; from now on, everything else printed goes to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
