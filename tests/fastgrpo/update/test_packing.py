"""What a packed batch holds, and where."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from fastgrpo.types import Completion, Prompt, TrainingGroup
from fastgrpo.update.packing import PackedBatch, contributes, idle_batch, pack


def make_group(row: int, prompt_length: int, lengths: Sequence[int], pictures: int = 0) -> TrainingGroup:
    """Every number names its owner: token t of completion i of row r is 1000 r + 100 i + t, weights likewise."""
    prompt = Prompt(
        row,
        1000 * row + 900 + torch.arange(prompt_length),
        torch.stack([torch.arange(prompt_length), torch.arange(prompt_length) * 2, torch.arange(prompt_length)]),
        torch.full((4 * pictures, 3), float(row)) if pictures else None,
        torch.tensor([[1, 2, 2]] * pictures) if pictures else None,
        "",
    )
    ids = [1000 * row + 100 * i + torch.arange(n) for i, n in enumerate(lengths)]
    completions = tuple(
        Completion(row, i, tokens, "", "stop", torch.zeros(len(tokens)), tokens + 0.25) for i, tokens in enumerate(ids)
    )
    advantages = torch.tensor([float(10 * row + i + 1) for i in range(len(lengths))])
    masks = tuple(tokens % 3 != 1 for tokens in ids)
    weights, old = tuple(tokens + 0.5 for tokens in ids), tuple(tokens + 0.75 for tokens in ids)
    return TrainingGroup(prompt, completions, advantages, weights, masks, old)


GROUPS = [make_group(1, 5, [3, 1, 4], pictures=1), make_group(2, 2, [1, 1]), make_group(3, 4, [6], pictures=2)]


def sees(batch: PackedBatch) -> torch.Tensor:
    """[T, T] bool: what the layout's three attentions let each token see."""
    layout, tokens = batch.layout, len(batch.input_ids)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    first = layout.prompt_tokens
    for segments, q_offset, k_offset, causal in (
        (layout.prompts, 0, 0, True),
        (layout.completions, first, first, True),
        (layout.across, first, 0, False),
    ):
        bounds = zip(segments.cu_q[:-1], segments.cu_q[1:], segments.cu_k[:-1], segments.cu_k[1:], strict=True)
        for q0, q1, k0, k1 in bounds:
            block = torch.ones(int(q1 - q0), int(k1 - k0), dtype=torch.bool)
            queries, keys = slice(q_offset + q0, q_offset + q1), slice(k_offset + k0, k_offset + k1)
            assert not seen[queries, keys].any()
            seen[queries, keys] = block.tril() if causal else block
    return seen


def check(groups: Sequence[TrainingGroup], batches: Sequence[PackedBatch], budget: int) -> None:
    """Each completion is somewhere once, whole, behind its own prompt, with its own numbers."""
    owners = [owner for batch in batches for owner in batch.owners]
    assert Counter(owners) == Counter((g, i) for g, group in enumerate(groups) for i in range(len(group.completions)))
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(batch.owners) == 1
        seen = sees(batch)
        pieces = zip(
            batch.owners, *(batch.split(getattr(batch, name)) for name in
            ("rows", "targets", "weights", "mask", "sampling_logprobs", "old_logprobs")), strict=True,
        )  # fmt: skip
        rows_of = {}
        for s, ((g, i), rows, targets, weights, mask, drawn, old) in enumerate(pieces):
            group, completion = groups[g], groups[g].completions[i]
            rows_of[g, i] = rows
            assert torch.equal(targets, completion.token_ids)
            assert torch.equal(weights, group.token_weights[i])
            assert torch.equal(mask, group.masks[i])
            assert torch.equal(drawn, completion.sampling_logprobs)
            assert torch.equal(old, group.old_logprobs[i])
            assert batch.advantages[s] == group.advantages[i]
            whole = torch.cat([group.prompt.input_ids, completion.token_ids])
            start = int(group.prompt.position_ids.max()) + 1
            steps = torch.arange(start, start + len(completion.token_ids)).expand(3, -1)
            positions = torch.cat([group.prompt.position_ids, steps], dim=1)
            for t, row in enumerate(rows.tolist()):  # the hidden state that predicts token t has seen all before it
                context = seen[row].nonzero()[:, 0]
                end = len(group.prompt.input_ids) + t
                assert torch.equal(batch.input_ids[context], whole[:end])
                assert torch.equal(batch.position_ids[:, context], positions[:, :end])
        parts = Counter(g for g, _ in set(batch.owners))
        for g in parts:  # the prompt is there once: all completions of the group start from one row
            assert len({int(rows[0]) for (group, _), rows in rows_of.items() if group == g}) == 1
        grids = [groups[g].prompt.image_grid_thw for g in sorted(parts) if groups[g].prompt.image_grid_thw is not None]
        if grids:
            assert torch.equal(batch.image_grid_thw, torch.cat(grids))
            assert len(batch.pixel_values) == batch.image_grid_thw.prod(1).sum()
            assert batch.pixel_values[:, 0].unique().tolist() == sorted(
                {float(groups[g].prompt.row_id) for g in parts if groups[g].prompt.pixel_values is not None}
            )
        else:
            assert batch.pixel_values is batch.image_grid_thw is None


@pytest.mark.parametrize("budget", [1, 5, 8, 9, 13, 14, 100])
def test_every_number_is_in_its_place(budget: int) -> None:
    check(GROUPS, pack(GROUPS, budget), budget)


@pytest.mark.parametrize("seed", range(30))
def test_random_groups(seed: int) -> None:
    draw = random.Random(seed)
    groups = [
        make_group(
            row, draw.randint(1, 9), [draw.randint(1, 7) for _ in range(draw.randint(1, 6))], draw.choice([0, 0, 1, 3])
        )
        for row in range(draw.randint(1, 7))
    ]
    budget = draw.randint(1, 60)
    batches = pack(groups, budget)
    check(groups, batches, budget)
    again = pack(groups, budget)
    assert [batch.owners for batch in again] == [batch.owners for batch in batches]


def test_a_group_that_fits_is_whole() -> None:
    batches = pack(GROUPS, 10)  # of 10, 2 and 9 input tokens
    assert sorted(sorted({g for g, _ in batch.owners}) for batch in batches) == [[0], [1], [2]]
    assert sorted(sorted({g for g, _ in batch.owners}) for batch in pack(GROUPS, 12)) == [[0, 1], [2]]
    assert len(pack(GROUPS, 21)) == 1


def test_a_group_above_the_budget_is_cut_between_completions() -> None:
    batches = pack(GROUPS[:1], 7)  # prompt of 5, completions that put in 2, 0 and 3 tokens
    assert [batch.owners for batch in batches] == [((0, 2),), ((0, 0), (0, 1))]
    assert [len(batch.input_ids) for batch in batches] == [8, 7]


def test_what_has_no_gradient_is_left_out() -> None:
    group = make_group(1, 5, [3, 2, 4, 2])
    zeros = torch.zeros(3, dtype=torch.bool)
    group = TrainingGroup(
        group.prompt,
        group.completions,
        torch.tensor([1.0, 0.0, -1.0, 1.0]),
        (*group.token_weights[:3], torch.zeros(2)),
        (zeros, *group.masks[1:]),
    )
    assert [contributes(group, i, 0.0) for i in range(4)] == [False, False, True, False]
    assert [contributes(group, i, 0.1) for i in range(4)] == [False, True, True, True]
    assert [batch.owners for batch in pack([group], 100, skip_beta=0.0)] == [((0, 2),)]
    assert [batch.owners for batch in pack([group], 100, skip_beta=0.1)] == [((0, 1), (0, 2), (0, 3))]
    nothing = TrainingGroup(group.prompt, group.completions, torch.zeros(4), group.token_weights, group.masks)
    assert pack([nothing], 100, skip_beta=0.0) == pack([], 100) == []


DUMMY_IMAGE = Prompt(
    -1, torch.tensor([7]), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(4, 3), torch.tensor([[1, 2, 2]]), ""
)


def test_the_dummy_image_joins_where_there_is_no_picture_and_is_read_by_nothing() -> None:
    with_pictures, without = (
        pack(GROUPS[:1], 100, dummy_image=DUMMY_IMAGE)[0],
        pack(GROUPS[1:2], 100, dummy_image=DUMMY_IMAGE)[0],
    )
    assert 7 not in with_pictures.input_ids
    assert torch.equal(without.image_grid_thw, DUMMY_IMAGE.image_grid_thw)
    check(GROUPS[:1], [with_pictures], 100)
    place = (without.input_ids == 7).nonzero()[:, 0]
    assert sees(without)[:, place].sum() == 1  # by itself


@pytest.mark.parametrize("dummy_image", [None, DUMMY_IMAGE])
def test_an_idle_batch_weighs_nothing(dummy_image: Prompt | None) -> None:
    batch = idle_batch(dummy_image)
    assert len(batch.input_ids) == 1
    assert batch.weights.sum() == batch.mask.sum() == 0
    assert (batch.pixel_values is None) == (dummy_image is None)
    assert len(batch.rows) == len(batch.targets) == batch.cu_seqlens[-1] == 1


def test_moving_a_batch_moves_all_of_it() -> None:
    moved = pack(GROUPS, 100)[0].to(torch.device("meta"))
    layout = moved.layout
    assert moved.rows.is_meta
    assert moved.old_logprobs.is_meta
    assert all(part.cu_q.is_meta and part.cu_k.is_meta for part in (layout.prompts, layout.completions, layout.across))


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_below_one_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=f"token_budget={budget} is not valid: use 1 or more"):
        pack(GROUPS, budget)
