"""The parts of a step that are transformers' own, each in its span: reading data, clipping, the optimizer, logging."""

import time
from typing import Any

from fastgrpo_profiling import span
from fastgrpo_profiling.watch import watch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer


class TimedSteps(Trainer):
    """Puts the spans around what `GRPOTrainer` inherits. Changes nothing else."""

    step_start = 0.0
    """When the step under way began (`time.perf_counter`)."""
    data_seconds = 0.0
    """What reading its rows took."""
    _watched: Optimizer | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Where a step begins: the loader may decode pictures in this process."""
        self.step_start = time.perf_counter()
        with span("data"):
            samples = super().get_batch_samples(*args, **kwargs)
        self.data_seconds = time.perf_counter() - self.step_start
        return samples

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
