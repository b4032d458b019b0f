"""A trainer with a run folder, whatever it trains by: logs, lock, checkpoints that resume, the model's card."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.row_dataset import Rows
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.training.checkpoints import NOT_RESUMING, find_checkpoint, load_state, reading
from fastgrpo.training.deepspeed_settings import forget_shared_buffers
from fastgrpo.training.guarded_steps import GuardedSteps
from fastgrpo.training.model_card import RunFacts, write_model_card
from fastgrpo.training.progress import ProgressDisplay, StepTrace
from fastgrpo.training.rank_watch import watched_ranks
from fastgrpo.training.rows import build_loader
from fastgrpo.training.run_log import RunLog
from fastgrpo.training.same_run import facts_of, require_same_run
from fastgrpo.training.step_log import StepLog
from fastgrpo.types import Engine

Found = TypeVar("Found")


class RunTrainer(GuardedSteps):
    """What GRPO and supervised fine-tuning share around their steps.

    A subclass sets `config` and `rows` before it calls this constructor (that of transformers' Trainer), `step_log`
    after it.
    """

    config: RunConfig
    rows: Rows
    builder: PromptBuilder
    """Of questions to score the model on."""
    engine: Engine
    updater: Any
    step_log: StepLog
    method: str
    """What the model's card calls the training."""
    reward_names: Sequence[str] = ()

    def __init__(self, **arguments: Any) -> None:
        super().__init__(args=self.config, **arguments)
        for shown_by_trainer in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown_by_trainer)
        output_dir = Path(self.config.output_dir)
        self.display = ProgressDisplay(self.config)
        self.add_callback(self.display)
        if self.config.profiled_steps:
            self.add_callback(StepTrace(output_dir, self.config.profiled_steps))
        self.run_log = RunLog(output_dir) if self.is_world_process_zero() else None

    # For subclasses

    def restore(self, checkpoint: Path | None) -> None:
        """Takes back what `save_more` wrote into the checkpoint that a run goes on from; None: a new run."""

    def run_begins(self) -> None:
        """The main process has cleared the output folder, or cut its logs back to the checkpoint."""

    # Logs

    def step_ended(self, **of_step: Any) -> None:
        """Logs the step that has ended."""
        self.step_log.step_ended(self.state, **of_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs carry our metrics too."""
        if "loss" in logs:
            logs |= self.step_log.line()
        elif "train_loss" in logs:  # the run's last line: what came behind the one before
            logs |= {name: value for name, value in self.step_log.line().items() if name != "loss"}
        super().log(logs, start_time)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains; `resume_from_checkpoint` (or the setting of that name) continues the same run, logs included.

        Raises:
            ValueError: no such checkpoint, or another run is writing into the output folder.
        """
        lock = nullcontext() if self.run_log is None else self.run_log.lock.held()
        with watched_ranks(self.config.ddp_timeout), lock, self.heeding_sigterm():
            checkpoint = self.begin(resume_from_checkpoint or self.config.resume_from_checkpoint)
            try:
                output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
                self.require_finite_weights()
                return output
            finally:
                self.display.close()

    def begin(self, resume: str | bool | None) -> Path | None:
        """Clears the output folder, or cuts its logs back to the checkpoint that the run goes on from: returned."""
        forget_shared_buffers(self.accelerator)
        output_dir = Path(self.config.output_dir)
        checkpoint = self.checkpoint_to_resume(resume, whole=True)
        state = load_state(checkpoint)
        if checkpoint is not None:
            require_same_run(checkpoint, state, self.facts(), self.config)
        self.step_log.start(state)
        with reading(checkpoint) if checkpoint else nullcontext():
            self.restore(checkpoint)
        if self.run_log is not None:
            if checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve():
                self.run_log.continue_after(state.get("step", 0))
            else:
                self.run_log.start_over()
            self.run_begins()
        self.run_id = self.on_main(lambda: "" if self.run_log is None else self.run_log.run_id())
        self.step_log.figures.measure_ceiling()
        return checkpoint

    def checkpoint_to_resume(self, resume: str | bool | None, *, whole: bool = False) -> Path | None:
        """What `find_checkpoint` finds on the main process, told to all ranks."""

        def find() -> Path | None:
            if self.run_log is None or resume in NOT_RESUMING:
                return None
            self.run_log.finish_moving()  # else an earlier run's checkpoints would be taken for this one's
            return find_checkpoint(resume, self.run_log.folder, run_id=self.run_log.known_run_id(), whole=whole)

        return self.on_main(find)

    def on_main(self, find: Callable[[], Found]) -> Found:
        """What the main process finds, on every rank; its ValueError too."""
        told: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                told[0] = find()
            except ValueError as error:
                told[1] = str(error)
        broadcast_object_list(told)
        if told[1] is not None:
            raise ValueError(told[1])
        found: Found = told[0]
        return found

    def facts(self) -> dict[str, Any]:
        """What makes the run the run it is."""
        return facts_of(self.config, self.rows, self.model, self.method, self.reward_names)

    def state_to_save(self) -> dict[str, Any]:
        """What `train` needs, beside transformers' own state, to continue."""
        if self.run_log is not None:
            self.run_log.sync()  # a checkpoint never knows of steps that the log lost
        about = {"facts": self.facts(), "settings": self.config.to_dict()}
        return {"step": self.state.global_step, **about, **self.step_log.state()}

    def write_card(self, folder: Path, scores: Mapping[str, float | None] | None = None) -> None:
        """Writes README.md beside a saved model; `scores` are figures on held-out rows, by what they are."""
        if self.run_log is not None:
            run = RunFacts(self.model, self.config, self.method, self.reward_names, self.state.global_step)
            write_model_card(folder, run, self.run_log, scores or {})

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Rows stay on the host and every rank picks its own, so accelerate has nothing to prepare."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return build_loader(self.rows, self.data_collator, self.config, rank, ranks)
