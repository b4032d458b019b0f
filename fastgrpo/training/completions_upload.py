"""Uploads the completions log to a data set on the hub while a run goes on (`log_completions_hub_repo`)."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitScheduler, create_repo
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastgrpo.config import GRPOConfig

MINUTES = 2
"""Between two uploads."""


class CompletionsUpload(TrainerCallback):
    """Commits what is new in the folder at intervals, and once more at the end."""

    def __init__(self, folder: Path, config: GRPOConfig) -> None:
        assert config.log_completions_hub_repo is not None
        self.folder = folder
        self.repo = config.log_completions_hub_repo
        self.private = config.hub_private_repo
        self.token = config.hub_token
        self._scheduler: CommitScheduler | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            create_repo(self.repo, repo_type="dataset", private=self.private, token=self.token, exist_ok=True)
            self._scheduler = CommitScheduler(
                repo_id=self.repo,
                repo_type="dataset",
                folder_path=self.folder,
                every=MINUTES,
                private=self.private,
                token=self.token,
                allow_patterns=["*.parquet"],
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.trigger().result()
            self._scheduler.stop()
            self._scheduler = None
