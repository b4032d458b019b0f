"""Data that comes as a stream: HF iterable data sets, and torch's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_files import changed, parameters

from fastgrpo.data.row_stream import StreamBatches, as_stream, is_stream, read_whole

datasets = pytest.importorskip("datasets")


def stream_of(count: int) -> Any:
    return datasets.Dataset.from_list([{"prompt": f"row {i}"} for i in range(count)]).to_iterable_dataset()


def batches(rows: Any, *, rank: int = 0, ranks: int = 1, **order: Any) -> Iterator[list[str]]:
    given = {"repeats": 1, "turns": 1, "shuffle": False, "seed": 0} | order
    for batch in StreamBatches(rows, 2, rank=rank, world_size=ranks, **given):
        yield [raw["prompt"] for _, raw in batch]


def take(iterator: Iterator[Any], count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]


def test_rows_come_in_their_order_without_shuffling() -> None:
    found = take(batches(as_stream(stream_of(5))), 2)
    assert found == [["row 0", "row 1"], ["row 2", "row 3"]]


def test_the_next_pass_follows_and_no_row_is_lost() -> None:
    found = take(batches(as_stream(stream_of(3))), 3)
    assert found == [["row 0", "row 1"], ["row 2", "row 0"], ["row 1", "row 2"]]


def test_rows_are_numbered_as_they_come() -> None:
    stream = StreamBatches(as_stream(stream_of(3)), 2, repeats=1, turns=1, shuffle=False, seed=0, rank=0, world_size=1)
    assert [[number for number, _ in batch] for batch in take(iter(stream), 2)] == [[0, 1], [2, 3]]


def test_a_rollout_repeats_for_its_steps_and_fills_a_steps_first_turn() -> None:
    found = take(batches(as_stream(stream_of(4)), repeats=2, turns=2), 6)
    assert found == [["row 0", "row 1"], [], ["row 0", "row 1"], [], ["row 2", "row 3"], []]


def test_ranks_share_a_rollout() -> None:
    rows = as_stream(stream_of(8))
    first, second = (take(batches(rows, rank=rank, ranks=2), 2) for rank in (0, 1))
    assert first == [["row 0", "row 1"], ["row 4", "row 5"]]
    assert second == [["row 2", "row 3"], ["row 6", "row 7"]]


def test_shuffling_is_seeded_and_differs_from_pass_to_pass() -> None:
    rows = as_stream(stream_of(8))
    taken = [take(batches(rows, shuffle=True, seed=seed), 8) for seed in (1, 1, 2)]
    one, again, other = ([prompt for batch in found for prompt in batch] for found in taken)
    assert one == again != other
    assert sorted(one[:8]) == sorted(one[8:]) == [f"row {i}" for i in range(8)]
    assert one[:8] != one[8:]


def test_what_is_a_stream() -> None:
    assert is_stream(stream_of(1))
    assert not is_stream([{"prompt": "a"}])
    assert not is_stream(datasets.Dataset.from_list([{"prompt": "a"}]))


def test_an_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match="read only once"):
        as_stream(iter([{"prompt": "a"}]))


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        as_stream(datasets.IterableDataset.from_generator(lambda: iter([])))


def test_columns_of_no_known_schema_are_named() -> None:
    with pytest.raises(ValueError, match="text"):
        as_stream(datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset())


def test_an_evaluation_set_is_read_whole() -> None:
    rows = read_whole(stream_of(3))
    assert len(rows) == 3
    assert rows[2] == (2, {"prompt": "row 2"})


def test_training_on_a_stream(build: Any) -> None:
    trainer = build(train_dataset=stream_of(3), max_steps=3, gradient_accumulation_steps=2)
    before = parameters(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(changed(before, trainer)) == len(before)


def test_a_stream_and_its_rows_train_the_same(build: Any) -> None:
    rows = [{"prompt": f"row {i}"} for i in range(4)]
    ends = []
    for data in (rows, datasets.Dataset.from_list(rows).to_iterable_dataset()):
        trainer = build(train_dataset=data, shuffle_dataset=False, max_steps=2)
        trainer.train()
        ends.append(parameters(trainer))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_worker_prepares_a_streams_prompts(build: Any) -> None:
    trainer = build(train_dataset=stream_of(4), max_steps=2, dataloader_num_workers=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_torch_stream(build: Any) -> None:
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, str]]:
            return iter([{"prompt": "a"}, {"prompt": "b"}])

    trainer = build(train_dataset=Rows())
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_stream_of_pictures(build: Any, tiny_model_dir: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "image": Image.new("RGB", (56, 56), c)} for c in ("red", "blue")
    ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = build(model=str(tiny_model_dir), train_dataset=stream)
    trainer.train()
    assert {text.count("<|image_pad|>") for text in trainer._logs["prompt"]} == {1}


def test_a_bad_row_of_a_stream_is_skipped_and_counted(build: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}, {"prompt": "c"}]
    trainer = build(train_dataset=datasets.Dataset.from_list(rows).to_iterable_dataset(), shuffle_dataset=False)
    trainer.train()
    assert trainer.state.log_history[0]["skipped_rows"] == 1


def test_a_resumed_stream_goes_on_behind_the_checkpoint(build: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    def look(prompts: list[str], **_: Any) -> list[float]:
        seen.extend(prompts[::2])
        return [float(i) for i in range(len(prompts))]

    settings = {"shuffle_dataset": False, "save_strategy": "steps", "save_steps": 1}
    build(reward_funcs=look, train_dataset=stream_of(6), max_steps=1, **settings).train()
    trainer = build(reward_funcs=look, train_dataset=stream_of(6), max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert seen == ["row 0", "row 1", "row 2", "row 3"]
