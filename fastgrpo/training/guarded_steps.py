"""Training that stops where going on would do harm: at what is not finite, and on SIGTERM."""

import errno
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from fastgrpo.atomic_files import remove
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.training.checkpoints import ASIDE, find_checkpoint
from fastgrpo.training.transformers_hooks import TransformersHooks

logger = logging.get_logger(__name__)

TERMINATED = 128 + signal.SIGTERM
"""The exit code after SIGTERM: 143."""
ONE_REQUEST_S = 3.0
"""SIGTERM within so many seconds of the first is the same request: launchers and clusters both send one to a rank."""


class NotFiniteError(ValueError):
    """A loss, gradients, a learning rate or weights are not finite."""


class GuardedSteps(TransformersHooks):
    """Checks every step before it is applied, and the weights before they are saved."""

    config: RunConfig
    _loss: Tensor | None = None
    _terminated_at: float | None = None

    # What is not finite

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._loss = super().training_step(model, inputs, num_items_in_batch)
        return self._loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before the optimizer steps; under DeepSpeed, which has stepped by itself then, after it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        scales = scaler is not None and scaler.is_enabled()  # fp16: a scale too large is lowered, its step left out
        if self.has_gradients and not scales and self._any_rank(not self._step_is_finite(norm)):
            loss = float("nan") if self._loss is None else float(self._loss)
            told = f"the loss is {loss:g}, the gradients' norm {float(norm or 0):g}, the learning rate {self._rate():g}"
            if self.config.on_nonfinite == "stop":
                raise NotFiniteError(self._told(self.state.global_step + 1, told))
            logger.warning(f"Step {self.state.global_step + 1} is left out: {told}.")
            for parameter in model.parameters():
                parameter.grad = None  # optimizers pass over these
            return torch.zeros(())
        return norm

    def _step_is_finite(self, norm: Any) -> bool:
        values = [torch.as_tensor(one).detach().float() for one in (self._loss, norm) if one is not None]
        finite = torch.stack([one.to(self.args.device) for one in values]).isfinite().all()
        return math.isfinite(self._rate()) and bool(finite)

    def _rate(self) -> float:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return next((rate for rate in rates if not math.isfinite(rate)), rates[0])

    def require_finite_weights(self) -> None:
        """Raises `NotFiniteError` where a weight is not finite, on all ranks together."""
        bad = next((name for name, one in self.model.named_parameters() if not bool(one.isfinite().all())), None)
        if self._any_rank(bad is not None):
            named = "" if bad is None else f", such as {bad}"
            raise NotFiniteError(self._told(self.state.global_step, f"weights are not finite{named}"))

    def _told(self, step: int, what: str) -> str:
        try:
            last = find_checkpoint("last", Path(self.args.output_dir))
        except ValueError:  # weights alone
            last = None
        return (
            f"step {step}: {what}. Training has diverged; the last good checkpoint is "
            f"{last or 'none: nothing was saved'}. Lower learning_rate or max_grad_norm, or leave such steps out with "
            "--on_nonfinite skip."
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite_weights()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if (why := _not_written(error)) is None:
                raise
            remove(Path(self.args.output_dir) / ASIDE)
            raise ValueError(
                f"checkpoint-{self.state.global_step} could not be written to {self.args.output_dir}: {why}. What was "
                "saved before is whole: make room, and go on with --resume_from_checkpoint last."
            ) from error

    # SIGTERM

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """The first SIGTERM saves a checkpoint when the step under way is done, and exits with 143; a second one exits
        at once. Only where nobody else handles it."""
        mine = threading.current_thread() is threading.main_thread() and not self.args.enable_jit_checkpoint
        if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        self._terminated_at = None
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_sigterm(self, *_: Any) -> None:
        if self._terminated_at is None:
            self._terminated_at = time.monotonic()
        elif time.monotonic() - self._terminated_at > ONE_REQUEST_S:
            os._exit(TERMINATED)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        stops = self._any_rank(self._terminated_at is not None)
        if stops:
            self.control.should_save, self.control.should_evaluate = True, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if stops:
            if self.is_world_process_zero():
                logger.warning(
                    f"SIGTERM: step {self.state.global_step} is saved; --resume_from_checkpoint last goes on from it."
                )
            raise SystemExit(TERMINATED)

    def _any_rank(self, holds: bool) -> bool:
        """Whether it holds on any rank. All ranks call it together."""
        if self.accelerator.num_processes == 1:
            return holds
        count = torch.tensor(int(holds), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum").item())


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def _not_written(error: Exception) -> str | None:
    """Why a disk took no more, in words; None for a fault of another kind."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in NO_ROOM else None
    text = str(error)
    found = re.search(r"\(os error (\d+)\)", text)  # safetensors'
    if found and int(found[1]) in NO_ROOM:
        return os.strerror(int(found[1]))
    is_writer = "PytorchStreamWriter" in text or "unexpected pos" in text  # torch's, which keeps the reason to itself
    return "the disk took no more" if is_writer else None
