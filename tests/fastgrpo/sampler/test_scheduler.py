"""Pages and rows: nothing lost, nothing given twice, whatever comes and goes."""

import random
from itertools import pairwise

import pytest
import torch

from fastgrpo.sampler.block_manager import BlockManager
from fastgrpo.sampler.prefill import plan_passes
from fastgrpo.sampler.scheduler import Scheduler
from fastgrpo.sampler.sequence import PromptGroup
from fastgrpo.types import Prompt


def make_group(row: int, length: int, size: int) -> PromptGroup:
    ids = torch.zeros(length, dtype=torch.int64)
    prompt = Prompt(row, ids, torch.arange(length).expand(3, -1), None, None, "")
    return PromptGroup.of(prompt, size, seed=0, step=0)


def test_pages_are_free_again_after_their_last_release() -> None:
    blocks = BlockManager(5, 16)
    shared, own = blocks.allocate(2, references=3), blocks.allocate(1)
    assert len({*shared, *own}) == 3
    assert (blocks.free, blocks.used) == (2, 3)
    for _ in range(2):
        blocks.release(shared)
        assert blocks.free == 2
    blocks.release(shared)
    assert blocks.free == 4
    blocks.release(own)
    assert sorted(blocks.allocate(5)) == list(range(5))


def test_pages_come_in_order_from_either_end() -> None:
    blocks = BlockManager(6, page_size=4)
    assert blocks.allocate(2) == [0, 1]
    assert blocks.allocate(2, last=True) == [4, 5]
    assert blocks.allocate(1) == [2]
    assert blocks.allocate(1, last=True) == [3]


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for_tokens(tokens: int, pages: int) -> None:
    assert BlockManager(1, 16).pages_for(tokens) == pages


def test_a_page_released_twice_is_noticed() -> None:
    blocks = BlockManager(2, 16)
    pages = blocks.allocate(1)
    blocks.release(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        blocks.release(pages)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 are free"):
        blocks.allocate(3)


def test_a_group_is_admitted_in_part_when_rows_or_pages_run_short() -> None:
    # A prompt of 2 pages, completions of 1 page each: two fit 4 pages.
    scheduler = Scheduler(BlockManager(4, 4), max_rows=8, max_groups=8, max_new_tokens=5)
    group = make_group(0, 7, 3)
    scheduler.add(group)
    assert scheduler.admit() == group.sequences[:2]
    assert scheduler.admit() == []
    scheduler.finish(group.sequences[0])
    assert scheduler.admit() == group.sequences[2:]
    assert scheduler.running == group.sequences[1:]
    rows = Scheduler(BlockManager(99, 4), max_rows=2, max_groups=8, max_new_tokens=5)
    rows.add(make_group(0, 7, 3))
    assert len(rows.admit()) == 2
    groups = Scheduler(BlockManager(99, 4), max_rows=9, max_groups=1, max_new_tokens=5)
    for row in range(2):
        groups.add(make_group(row, 7, 3))
    assert len(groups.admit()) == 3


def test_who_comes_first_is_served_first() -> None:
    """A short prompt does not overtake a long one that has to wait for pages."""
    scheduler = Scheduler(BlockManager(5, 4), max_rows=8, max_groups=8, max_new_tokens=5)
    first, long, short = make_group(0, 4, 1), make_group(1, 12, 1), make_group(2, 4, 1)
    for group in (first, long, short):
        scheduler.add(group)
    assert scheduler.admit() == first.sequences
    scheduler.finish(first.sequences[0])
    assert scheduler.admit() == long.sequences


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(BlockManager(4, 16), max_rows=8, max_groups=8, max_new_tokens=17)
    scheduler.add(make_group(0, 48, 1))
    with pytest.raises(ValueError, match=r"max_cache_tokens=64 is too small: row 7 .* 49 tokens and needs 80"):
        scheduler.add(make_group(7, 49, 1))


def check(scheduler: Scheduler, groups: list[PromptGroup]) -> None:
    """Every page is free or has exactly as many references as unfinished sequences hold it."""
    blocks = scheduler.blocks
    held = [0] * blocks.num_pages
    for group in groups:
        for sequence in group.sequences:
            for page in sequence.pages:
                held[page] += 1
        if group.pages and group.unfinished:
            for page in group.pages:
                held[page] += group.unfinished
    assert held == blocks.references
    assert blocks.used == sum(count > 0 for count in held)
    own = [page for group in groups for sequence in group.sequences for page in sequence.pages]
    shared = [page for group in groups if group.unfinished for page in group.pages]
    assert len({*own, *shared}) == len(own) + len(shared), "a page has two owners"
    assert len(scheduler.running) <= scheduler.max_rows
    by_prompt = [sequence.group.prompt.row_id for sequence in scheduler.running]
    changes = sum(a != b for a, b in pairwise(by_prompt))
    assert len(set(by_prompt)) <= scheduler.max_groups
    assert changes == max(0, len(set(by_prompt)) - 1), "the rows of a prompt are not side by side"


def test_random_schedules_lose_no_page() -> None:
    """2,000 schedules of arrivals, ends in any order and aborts of running and waiting sequences."""
    for trial in range(2000):
        rng = random.Random(trial)
        page_size = rng.choice([1, 4, 16])
        blocks = BlockManager(rng.randint(4, 40), page_size)
        scheduler = Scheduler(
            blocks,
            max_rows=rng.randint(1, 8),
            max_groups=rng.randint(1, 4),
            max_new_tokens=rng.randint(1, 3 * page_size),
        )
        longest = (blocks.num_pages - scheduler.suffix_pages) * page_size
        groups: list[PromptGroup] = []
        arrivals = rng.randint(1, 6)
        ended: list[int] = []
        while arrivals or scheduler.has_work:
            if arrivals and (rng.random() < 0.5 or not scheduler.has_work):
                group = make_group(len(groups), rng.randint(1, max(1, min(longest, 8 * page_size))), rng.randint(1, 4))
                arrivals -= 1
                if blocks.pages_for(group.length) + scheduler.suffix_pages > blocks.num_pages:
                    with pytest.raises(ValueError, match="max_cache_tokens"):
                        scheduler.add(group)
                    continue
                scheduler.add(group)
                groups.append(group)
            admitted = scheduler.admit()
            assert scheduler.running or not scheduler.waiting, "everything waits and nothing runs"
            assert scheduler.running[len(scheduler.running) - len(admitted) :] == admitted
            alive = [*scheduler.running, *(list(scheduler.waiting) if rng.random() < 0.1 else [])]
            for sequence in rng.sample(alive, min(len(alive), rng.randint(0, 3))):
                scheduler.finish(sequence)
                ended.append(id(sequence))
            check(scheduler, groups)
        assert blocks.used == 0
        assert sorted(ended) == sorted(id(sequence) for group in groups for sequence in group.sequences)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [20], [7, 1, 9, 30, 2], [8, 8]])
@pytest.mark.parametrize("max_tokens", [1, 8, 64])
def test_passes_cover_every_prompt_in_order_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    groups = [make_group(row, length, 1) for row, length in enumerate(lengths)]
    passes = list(plan_passes(groups, max_tokens))
    assert all(sum(end - start for _, start, end in pieces) <= max_tokens for pieces in passes)
    assert len(passes) == -(-sum(lengths) // max_tokens)
    for group in groups:
        spans = [(start, end) for pieces in passes for g, start, end in pieces if g is group]
        assert spans[0][0] == 0
        assert spans[-1][1] == group.length
        assert all(a[1] == b[0] for a, b in pairwise(spans))
