"""What a checkpoint keeps of a half-used rollout comes back as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrpo.training.half_rollout import load_slices, save_slices
from fastgrpo.types import Completion, Prompt, TrainingGroup

IDS = torch.arange(3)
PROMPTS = {row: Prompt(row, IDS, IDS.expand(3, -1), None, None, f"prompt {row}") for row in (4, 7)}


def group(row: int, lengths: tuple[int, ...], *, old: bool) -> TrainingGroup:
    draw = torch.Generator().manual_seed(row)
    completions = tuple(
        Completion(
            row, i, torch.randint(9, (n,), generator=draw), f"text {i}", "abort" if n == 0 else "stop",
            torch.randn(n, generator=draw), torch.randn(n, generator=draw),
            ref_logprobs=torch.randn(n, generator=draw) if i % 2 else None,
        )
        for i, n in enumerate(lengths)
    )  # fmt: skip
    return TrainingGroup(
        PROMPTS[row],
        completions,
        torch.randn(len(lengths), generator=draw),
        tuple(torch.full((n,), 0.25) for n in lengths),
        tuple(torch.arange(n) % 2 == 0 for n in lengths),
        tuple(torch.randn(n, generator=draw) for n in lengths) if old else None,
    )


def assert_equal(found: TrainingGroup, expected: TrainingGroup) -> None:
    assert found.prompt is expected.prompt
    for ours, theirs in zip(found.completions, expected.completions, strict=True):
        assert (ours.row_id, ours.index, ours.text, ours.finish_reason) == (
            theirs.row_id, theirs.index, theirs.text, theirs.finish_reason,
        )  # fmt: skip
        for name in ("token_ids", "logprobs", "sampling_logprobs"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert (ours.ref_logprobs is None) == (theirs.ref_logprobs is None)
        assert ours.ref_logprobs is None or torch.equal(ours.ref_logprobs, theirs.ref_logprobs)
    assert torch.equal(found.advantages, expected.advantages)
    for name in ("token_weights", "masks", "old_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours or (), theirs or (), strict=True))


@pytest.mark.parametrize("old", [True, False])
def test_updates_come_back_with_every_tensor_and_in_their_order(tmp_path: Path, old: bool) -> None:
    first, second = [group(4, (2, 5), old=old)], [group(7, (3, 0, 1), old=old), group(4, (1,), old=old)]
    updates = [second, first, second]
    asked: list[int] = []

    def prompts_of(rows: list[int]) -> list[Prompt]:
        asked.extend(rows)
        return [PROMPTS[row] for row in rows]

    save_slices(updates, tmp_path, rank=1, ranks=2)
    found = load_slices(tmp_path, 1, 2, prompts_of)
    assert asked == [4, 7]
    for ours, theirs in zip(found, updates, strict=True):
        for mine, expected in zip(ours, theirs, strict=True):
            assert_equal(mine, expected)


def test_prompts_of_an_environment_and_pictures_of_tools_come_back(tmp_path: Path) -> None:
    ids = torch.arange(5)
    opened = replace(PROMPTS[4], input_ids=ids, position_ids=ids.expand(3, -1))
    shown = replace(opened, pixel_values=torch.rand(4, 6), image_grid_thw=torch.tensor([[1, 2, 2]]))
    saved = replace(group(4, (2, 3), old=False), prompt=opened)
    with_picture = replace(saved.completions[1], whole=replace(shown, image_digests=(b"ab",)))
    save_slices([[replace(saved, completions=(saved.completions[0], with_picture))]], tmp_path, rank=0, ranks=1)
    [[found]] = load_slices(tmp_path, 0, 1, lambda rows: [PROMPTS[4]])
    whole = found.completions[1].whole
    assert found.completions[0].whole is None
    assert whole is not None
    for prompt in (found.prompt, whole):
        assert prompt.input_ids.tolist() == prompt.position_ids[2].tolist() == ids.tolist()
    assert found.prompt.pixel_values is None
    assert whole.image_digests == (b"ab",)
    torch.testing.assert_close(whole.pixel_values, shown.pixel_values)


def test_nothing_is_taken_over_on_other_ranks(tmp_path: Path) -> None:
    save_slices([[group(4, (2,), old=True)]], tmp_path, rank=0, ranks=2)
    for rank, ranks in ((1, 2), (0, 1), (0, 4)):
        assert load_slices(tmp_path, rank, ranks, lambda rows: [PROMPTS[row] for row in rows]) == []
    save_slices([], tmp_path / "between", rank=0, ranks=1)
    assert not (tmp_path / "between").exists()


def test_a_rank_without_rows_keeps_its_empty_steps(tmp_path: Path) -> None:
    save_slices([[], []], tmp_path, rank=0, ranks=1)
    assert load_slices(tmp_path, 0, 1, lambda rows: []) == [[], []]
