"""What a run shows while it runs."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from fastgrpo_profiling import SpanRecorder, record
from fastgrpo_profiling.phases import PARTS
from fastgrpo_profiling.trace import write_trace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastgrpo.safe_text.inert import inert
from fastgrpo.safe_text.terminal import Terminal
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.training.completion_records import CompletionRecord

SHOWN = {
    "reward": "reward {:.3f}",
    "completions/mean_length": "length {:.0f}",
    "kl": "kl {:.4f}",
    "entropy": "entropy {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
}
"""Metric → how the progress line says it; the shares of a step's time follow."""
SMALLEST_SHARE = 0.01


class ProgressDisplay(TrainerCallback):
    """A live bar on a terminal, a plain line per log elsewhere (a file, a batch job)."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Terminal(stderr=True)
        self.progress: Progress | None = None
        self.start_time = 0.0
        self.start_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.start_time, self.start_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal or self.config.disable_tqdm:
            return
        self.progress = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # What a narrow terminal has no room for is cut here, not from the bar.
            TextColumn(
                "{task.fields[figures]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            console=self.console,
            expand=True,
        )
        self.progress.start()
        self.progress.add_task("train", total=state.max_steps, completed=state.global_step, figures="")

    def show(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """Moves the bar on; called after every step."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step, figures=_figures(metrics))

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs or self.progress is not None:
            return
        done = state.global_step - self.start_step
        seconds = (time.monotonic() - self.start_time) / max(done, 1) * (state.max_steps - state.global_step)
        figures = _figures(logs)
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {figures}  ETA {int(seconds) // 60}:{int(seconds) % 60:02d}",
            highlight=False,
            soft_wrap=True,
        )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stops the live bar; also when training raised."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def print_completions(self, records: Sequence[CompletionRecord]) -> None:
        """Prints a rollout's first completions (`num_completions_to_print`)."""
        if self.config.log_unique_prompts:
            records = list({record.row_id: record for record in reversed(records)}.values())[::-1]
        for one in records[: self.config.num_completions_to_print or 0]:
            self.console.print(Rule(f"row {one.row_id} · reward {one.reward} · advantage {one.advantage:.2f}"))
            self.console.print(Text(inert(one.prompt), style="dim"), Text(inert(one.completion)))


class StepTrace(TrainerCallback):
    """Writes trace.json, for Perfetto, of the optimizer steps `first` to `last`."""

    def __init__(self, output_dir: Path, steps: tuple[int, int]) -> None:
        self.path = output_dir / "trace.json"
        self.first, self.last = steps
        self._block = ExitStack()
        self._recorder: SpanRecorder | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begin_after(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.last:
            self._finish()
        self._begin_after(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._finish()

    def _begin_after(self, state: TrainerState) -> None:
        if state.is_world_process_zero and state.global_step + 1 == self.first:
            on_device = torch.cuda.is_available()
            self._recorder = self._block.enter_context(record(SpanRecorder(on_device=on_device, trace=True)))

    def _finish(self) -> None:
        if self._recorder is not None:
            self._block.close()
            write_trace(self.path, {f"steps {self.first} to {self.last}": self._recorder.events})
            self._recorder = None


def _figures(metrics: dict[str, float]) -> str:
    told = [text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics]
    shares = {part: metrics.get(f"share/{part}", 0.0) for part in PARTS}
    return "  ".join([*told, *(f"{share:.0%} {part}" for part, share in shares.items() if share >= SMALLEST_SHARE)])
