"""The parts of a step that are transformers' own, each in its span: reading data, clipping, the optimizer, logging."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from fastgrpo_profiling import SpanRecorder, SpanTotal, record, span
from fastgrpo_profiling.watch import watch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer


class TimedSteps(Trainer):
    """Puts the spans around what `GRPOTrainer` inherits, and sums up those of each step. Changes nothing else."""

    _recording: tuple[ExitStack, SpanRecorder, float] | None = None
    """Of the step under way: its open recording, and when it began."""
    _watched: Optimizer | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; a step that is left half-way is recorded no further."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.end_step()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Where a step begins: the loader may decode pictures in this process."""
        self.end_step()
        block, start = ExitStack(), time.perf_counter()
        self._recording = block, block.enter_context(record()), start
        with span("data"):
            return super().get_batch_samples(*args, **kwargs)

    def end_step(self) -> tuple[Mapping[str, SpanTotal], float]:
        """Ends the recording of the step under way; its spans by name, and its seconds. Without a step: nothing, 0.

        On a GPU this waits for the step's last span, the optimizer's.
        """
        if self._recording is None:
            return {}, 0.0
        (block, recorder, start), self._recording = self._recording, None
        block.close()
        return recorder.totals, time.perf_counter() - start

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with span("update/clip"):
            return super()._clip_grad_norm(model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        stepping = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the one of an earlier `train`
        if isinstance(stepping, Optimizer) and stepping is not self._watched:
            watch_optimizer(stepping, "update/optimizer")
            self._watched = stepping
        return optimizer

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with span("log"):
            super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
