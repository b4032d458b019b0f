"""The rows that users pass to the trainer, in their many forms, and what makes prompts of them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from fastgrpo.config import GRPOConfig
from fastgrpo.data.examples import ExampleBuilder, ExampleCollator
from fastgrpo.data.prompts import PromptBuilder, PromptCollator
from fastgrpo.data.row_dataset import RowDataset, Rows, as_rows, warn_of_shared_rows
from fastgrpo.data.row_order import RolloutLoader, RolloutSampler
from fastgrpo.data.row_stream import RowStream, StreamBatches, as_stream, is_stream, read_whole, stream_loader
from fastgrpo.data.worker_end import end_with_parent
from fastgrpo.model.load import Processing
from fastgrpo.scoring.rewards import RewardFunction, reads_golds
from fastgrpo.settings.run_config import RunConfig
from fastgrpo.types import RowError

AnyRows = TypeVar("AnyRows", bound=Rows)

FIRST_ROWS = 100
"""Rows of a stream that are looked at before training."""


def resolve_rows(dataset: Any, config: GRPOConfig, reward_functions: Sequence[RewardFunction]) -> Rows:
    """The rows to train on; where rewards read gold answers, rows without a usable one will be skipped.

    Raises:
        ValueError: no rows, none that becomes a prompt, a stream without `max_steps` or one that a rank is to hand out.
    """
    if is_stream(dataset):
        if config.accelerator_config.dispatch_batches:
            raise ValueError("accelerator_config: Iterable datasets require `dispatch_batches=False`, ranks read them.")
        config.accelerator_config.dispatch_batches = False
        if config.max_steps <= 0:
            raise ValueError("train_dataset is a stream, whose length is not known: set max_steps.")
    read = as_stream if is_stream(dataset) else as_rows
    return _checked(read(dataset, config.seed, name="train_dataset"), reward_functions)


def resolve_held_out(
    dataset: Any, config: GRPOConfig, reward_functions: Sequence[RewardFunction], name: str = "eval_dataset"
) -> Any:
    """The rows to evaluate on: a `RowDataset`, a dict of several by name, or None. A stream is read whole."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {
            key: resolve_held_out(one, config, reward_functions, f"{name}[{key!r}]") for key, one in dataset.items()
        }
    read = read_whole if is_stream(dataset) else as_rows
    return _checked(read(dataset, config.seed, name=name), reward_functions)


def _checked(rows: AnyRows, reward_functions: Sequence[RewardFunction]) -> AnyRows:
    return rows.with_checked_golds() if reads_golds(reward_functions) else rows


def require_a_good_row(rows: Rows, builder: PromptBuilder | ExampleBuilder) -> None:
    """Looks for the first row that can be built, so that a data set without any fails before training.

    Of a stream, the first `FIRST_ROWS` are looked at.
    """
    first_reason = ""
    count = 0
    for row_id, raw in _numbered(rows):
        count += 1
        try:
            builder.build(rows.convert(row_id, raw))
        except RowError as error:
            first_reason = first_reason or f"row {row_id}: {error}"
        else:
            return
    raise ValueError(f"none of the {count} rows can be used; {first_reason}")


def _numbered(rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    if isinstance(rows, RowStream):
        return enumerate(itertools.islice(rows.read(), FIRST_ROWS))
    assert isinstance(rows, RowDataset)
    return (rows[i] for i in range(len(rows)))


def build_prompt_builder(processing: Processing, config: GRPOConfig) -> PromptBuilder:
    """What turns rows into prompts."""
    return PromptBuilder(
        processing.tokenizer,
        processing.image_processor,
        family=processing.family,
        mode=config.prompt_mode,
        template=config.prompt_template,
        max_prompt_length=config.max_prompt_length,
        chat_template_kwargs=config.template_kwargs,
    )


def build_loader(
    rows: Rows, collate: PromptCollator | ExampleCollator, config: RunConfig, rank: int, ranks: int
) -> DataLoader:
    """A rank's prompts, in the run's order of rows; the micro-batches are those that transformers counts.

    Raises:
        ValueError: the data set is smaller than one rollout.
    """
    plan = config.batch_plan
    order: dict[str, Any] = {
        "repeats": plan.slices_between_rollouts,
        "turns": plan.micro_batches_per_slice,
        "shuffle": config.shuffle_dataset,
        "seed": config.seed if config.data_seed is None else config.data_seed,
        "rank": rank,
        "world_size": ranks,
    }
    options: dict[str, Any] = {
        "num_workers": config.dataloader_num_workers or 0,
        "prefetch_factor": config.dataloader_prefetch_factor,
        "persistent_workers": config.dataloader_persistent_workers,
        "multiprocessing_context": config.dataloader_multiprocessing_context,
        "in_order": config.dataloader_in_order,
        "worker_init_fn": end_with_parent,
    }
    if isinstance(rows, RowStream):
        return stream_loader(StreamBatches(rows, plan.prompts_per_rollout, **order), collate, **options)
    assert isinstance(rows, RowDataset)
    sampler = RolloutSampler(len(rows), plan.prompts_per_rollout, **order)
    return RolloutLoader(rows, batch_sampler=sampler, collate_fn=collate, **options)


def warn_of_known_rows(rows: Rows, held_out: Any) -> None:
    """Warns of each held-out set that comes from where the rows to train on do."""
    for one in held_out.values() if isinstance(held_out, dict) else [held_out]:
        if one is not None:
            warn_of_shared_rows(rows, one)
