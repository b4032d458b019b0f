from typing import Any

import pytest

from fastgrpo.data.row_order import RolloutLoader, RolloutSampler


def sampler(epoch: int = 0, **changes: Any) -> RolloutSampler:
    settings = {"batch_size": 4, "repeats": 1, "shuffle": True, "seed": 7, "rank": 0, "world_size": 1, **changes}
    made = RolloutSampler(settings.pop("num_rows", 20), **settings)
    made.set_epoch(epoch)
    return made


def test_same_order_for_the_same_seed_and_epoch() -> None:
    assert list(sampler(epoch=3)) == list(sampler(epoch=3))
    walked = sampler()
    list(walked)  # having been used, or asked for its first epoch, changes nothing
    walked.set_epoch(3)
    assert list(walked) == list(sampler(epoch=3))


def test_new_order_for_another_epoch_or_seed() -> None:
    orders = [list(sampler(epoch=e, seed=s)) for e in range(3) for s in range(3)]
    assert len({str(order) for order in orders}) == len(orders)


def test_an_epoch_shows_every_row_at_most_once() -> None:
    rows = [row for batch in sampler() for row in batch]
    assert sorted(rows) == list(range(20))
    assert rows != sorted(rows)


def test_rows_in_their_own_order_without_shuffling() -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(sampler(num_rows=10, shuffle=False)) == batches
    assert list(sampler(num_rows=10, shuffle=False, epoch=5)) == batches


def test_left_over_rows_wait_for_another_epoch() -> None:
    """10 rows by 4: two are left out, not always the same two."""
    left_out = set()
    for epoch in range(20):
        batches = list(sampler(num_rows=10, epoch=epoch))
        assert [len(batch) for batch in batches] == [4, 4]
        left_out |= set(range(10)) - {row for batch in batches for row in batch}
    assert left_out == set(range(10))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_order(world_size: int) -> None:
    size = 8 // world_size
    ranks = [list(sampler(num_rows=50, batch_size=size, rank=r, world_size=world_size)) for r in range(world_size)]
    together = [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]
    assert together == list(sampler(num_rows=50, batch_size=8))
    seen = [row for step in together for row in step]
    assert len(seen) == len(set(seen)) == 48


def test_a_rollout_comes_once_per_optimizer_step_on_it() -> None:
    once, thrice = list(sampler()), list(sampler(repeats=3))
    assert thrice == [batch for batch in once for _ in range(3)]


@pytest.mark.parametrize(
    "settings", [{}, {"num_rows": 11}, {"repeats": 3}, {"num_rows": 50, "world_size": 3, "rank": 2}]
)
def test_length_is_the_number_of_batches(settings: dict[str, Any]) -> None:
    assert len(sampler(**settings)) == len(list(sampler(**settings)))


def test_data_set_smaller_than_a_rollout() -> None:
    with pytest.raises(ValueError, match=r"has 7 rows, but one rollout takes 8 prompts.*per_device_train_batch_size"):
        sampler(num_rows=7, world_size=2)
    assert len(sampler(num_rows=8, world_size=2)) == 1


def test_the_loader_passes_the_epoch_on() -> None:
    loader = RolloutLoader(range(20), batch_sampler=sampler(), collate_fn=list)  # type: ignore[arg-type]
    loader.set_epoch(4)
    assert list(loader) == list(sampler(epoch=4))


def test_where_a_step_has_several_micro_batches_the_first_holds_its_rows() -> None:
    steps = list(sampler(num_rows=8, shuffle=False, repeats=2))
    turns = sampler(num_rows=8, shuffle=False, repeats=2, turns=3)
    assert list(turns) == [rows for step in steps for rows in (step, [], [])]
    assert len(turns) == 3 * len(steps)
