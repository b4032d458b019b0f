"""What a run logs: the figures of each optimizer step, once, under TRL's names."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from fastgrpo_profiling import SpanTotal
from transformers import TrainerState

from fastgrpo.safe_text.inert import inert
from fastgrpo.scoring.advantages import Advantages
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.training.completion_records import CompletionRecord, records_of
from fastgrpo.training.live_figures import LiveFigures, trained_part
from fastgrpo.training.metrics import rollout_metrics, update_metrics
from fastgrpo.training.progress import ProgressDisplay
from fastgrpo.training.run_log import RunLog
from fastgrpo.types import PromptBatch, ScoredRollout, SkippedRow, TrainingGroup, UpdateResult

logger = logging.getLogger(__name__)

LATEST = ("num_tokens", "skipped_rows", "learning_rate", "epoch")
"""Metrics of which a log line shows the latest value rather than the mean."""


class StepLog:
    """Collects a step's figures on every rank; the main one writes and shows them.

    Args:
        reward_names: distinct names, one per reward function.
        figures: how well a step uses the machine.
        files: the run's log files; None on other ranks than the main one.
        display: what a run shows while it runs.
    """

    def __init__(
        self,
        config: RunConfig,
        reward_names: Sequence[str],
        accelerator: Accelerator,
        figures: LiveFigures,
        files: RunLog | None,
        display: ProgressDisplay,
    ) -> None:
        self.config = config
        self.reward_names = reward_names
        self.accelerator = accelerator
        self.figures = figures
        self.files = files
        self.display = display
        self.skipped_rows = 0
        """Bad rows met so far; one that comes again each epoch counts each time."""
        self._step: dict[str, float] = {}
        self._of_rewards: dict[str, float] = {}
        """Logged by reward functions (`log_metric`), in the step under way."""
        self._extra: dict[str, Sequence[Any]] = {}
        """Logged by reward functions (`log_extra`): a value per completion of the rollout under way."""
        self.window: defaultdict[str, list[float]] = defaultdict(list)
        """Each metric since the last log line."""
        self.eval_window: defaultdict[str, list[float]] = defaultdict(list)
        """What scripts add to the next evaluation's figures."""
        self.records: list[CompletionRecord] = []
        """The completions of the last step that drew some, of all ranks."""
        self._of_rollouts: defaultdict[str, list[float]] = defaultdict(list)
        """Each metric of the step's rollouts; most steps have one at most."""
        self._drawn_tokens = 0
        self._named_rows: set[int] = set()
        self._clashes: set[str] = set()

    def start(self, state: Mapping[str, Any]) -> None:
        """Begins a run, or goes on with one that left `state`."""
        self.skipped_rows = state.get("skipped_rows", 0)
        self.window = defaultdict(list, state.get("window", {}))
        self._of_rollouts.clear()
        self._step, self._of_rewards, self._extra, self._drawn_tokens = {}, {}, {}, 0

    def state(self) -> dict[str, Any]:
        """What `start` needs to go on."""
        return {"skipped_rows": self.skipped_rows, "window": self.window}

    def log_extra(self, name: str, values: Any) -> None:
        """A column for the completions log, from a reward function: a list, or a tensor or array of rank 1."""
        name = inert(name)
        if name in self._extra:
            self._warn_once(name, f"log_extra({name!r}, …) comes twice a step: the last column is kept.")
        self._extra[name] = values.tolist() if hasattr(values, "tolist") else list(values)

    def log_metric(self, name: str, value: Any) -> None:
        """A figure of the step, from a reward function; a number, or a tensor or array of one."""
        self._of_rewards[inert(name)] = float(value)

    def skip(self, rows: Sequence[SkippedRow]) -> None:
        """Counts this rank's rows that were left out, and tells each once. All ranks call it together."""
        skipped = gather_object(list(rows))
        self.skipped_rows += len(skipped)
        self._step["skipped_rows"] = float(self.skipped_rows)
        for row in skipped:
            self._warn_once(f"row {row.row_id}", f"row {row.row_id} skipped: {row.reason}")  # it comes again each epoch

    def rollout(
        self,
        batch: PromptBatch,
        rollouts: Sequence[ScoredRollout],
        advantages: Advantages,
        state: TrainerState,
        accepted_per_step: float | None = None,
    ) -> None:
        """A fresh rollout, and this rank's tokens a decode step under speculation. All ranks call it together."""
        mine = records_of(
            rollouts, self.reward_names, advantages, thumbnails=self.config.log_multimodal, extra=self._extra
        )
        records = gather_object(mine)
        self.records = [*(self.records if self._of_rollouts else []), *records]
        self._extra = {}
        self.skip(batch.skipped)
        state.num_input_tokens_seen += sum(record.length + record.prompt_length for record in records)
        for name, value in rollout_metrics(records).items():
            self._of_rollouts[name].append(value)
        self._step |= means_of(self._of_rollouts)
        if accepted_per_step is not None:
            self._step["sampling/accepted_per_step"] = accepted_per_step
        self._drawn_tokens += sum(record.length for record in records)
        self.figures.drew(rollouts)
        if self.files is None:
            return
        self._warn_of_unscored(rollouts)
        self.display.print_completions(records)
        if self.config.log_completions:
            self.files.completions(state.global_step + 1, self.records)

    def update(
        self, groups: Sequence[TrainingGroup], result: UpdateResult, state: TrainerState, more: Mapping[str, float]
    ) -> bool:
        """The step's update, with further metrics; returns whether any rank trained on anything. All ranks call it
        together."""
        self.figures.trains_on(trained_part(groups, self.config.beta))
        metrics = update_metrics(result, self.config, self.accelerator)
        self._step |= {**metrics, **more}
        self._step |= {"num_tokens": float(state.num_input_tokens_seen), "skipped_rows": float(self.skipped_rows)}
        return metrics.keys() != {"loss"}

    def step_ended(
        self,
        state: TrainerState,
        *,
        grad_norm: float,
        learning_rate: float,
        spans: Mapping[str, SpanTotal],
        seconds: float,
    ) -> None:
        """Writes and shows the step that has ended: `state.global_step`."""
        metrics: dict[str, Any] = {
            "epoch": state.epoch,
            **self._step,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "step_time": seconds,
            "tokens_per_second": self._drawn_tokens / seconds,
            **self.figures.of_step(spans, seconds),
        }
        for name, value in self._of_rewards.items():
            if name in metrics or name == "step":
                self._warn_once(name, f"log_metric({name!r}, …): a metric of ours has that name; it is custom/{name}.")
            metrics[f"custom/{name}" if name in metrics or name == "step" else name] = value
        self._of_rollouts.clear()
        self._step, self._of_rewards, self._drawn_tokens = {}, {}, 0
        for name, value in metrics.items():
            self.window[name].append(value)
        self.display.show(state, metrics)
        if self.files is not None:
            self.files.metrics(state.global_step, metrics)

    def line(self) -> dict[str, float]:
        """A log line: the mean of every metric since the last one, the latest value of what adds up."""
        logs = means_of(self.window)
        logs |= {name: self.window[name][-1] for name in LATEST if name in self.window}
        self.window.clear()
        return logs

    def eval_line(self) -> dict[str, float]:
        """The means of what scripts added since the last evaluation."""
        logs = means_of(self.eval_window)
        self.eval_window.clear()
        return logs

    def _warn_of_unscored(self, rollouts: Sequence[ScoredRollout]) -> None:
        """Shows the first completion of a run of which every reward function returned None: it teaches nothing."""
        for rollout in rollouts:
            for completion, rewards in zip(rollout.completions, rollout.rewards, strict=True):
                if bool(rewards.isnan().all()):
                    seen = {**rollout.prompt.columns, **completion.columns}
                    seen |= {"prompt": rollout.prompt.text, "completion": completion.text}
                    self._warn_once(
                        "unscored",
                        f"All reward functions returned None for the following kwargs:\n{seen}\nSuch completions "
                        "teach nothing: let one function return a number. Further ones are not reported.",
                    )
                    return

    def _warn_once(self, what: str, message: str) -> None:
        if self.files is not None and what not in self._clashes:
            self._clashes.add(what)
            logger.warning(message)


def means_of(window: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each name's values."""
    return {name: sum(values) / len(values) for name, values in window.items() if values}
