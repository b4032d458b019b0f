"""Packs rollout groups into padding-free micro-batches under a token budget, each prompt once.

A packed batch is one row of tokens: all prompts first, then all completions, group by group. Completions of a group
share one prompt (`SharedPrefixLayout` says which), so a prompt is stored and computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.model.segments import Segments, moved, offsets
from fastgrpo.types import Example, Prompt, TrainingGroup

ONE_TOKEN = Prompt(-1, torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), None, None, "")
"""The shortest prompt, for a forward pass whose output is not used."""


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Which token of a packed batch attends to which: three variable-length attentions over its [T] tokens."""

    prompt_tokens: int
    """Number of prompt tokens; they come first, completions follow."""
    prompts: Segments
    """Causal: each prompt to itself."""
    completions: Segments
    """Causal: each completion to itself."""
    across: Segments
    """All completions of a group to their prompt; 0 queries for a prompt without completions."""
    windows: dict[tuple[int, torch.device], "Windowed"] = field(default_factory=dict, compare=False)
    """Made when first asked for; the layers of a model share them."""

    @property
    def longest(self) -> int:
        """At least the tokens of the longest prompt and completion together."""
        return max(self.prompts.q_lengths, default=0) + max(self.completions.q_lengths, default=0)

    def windowed(self, window: int, device: torch.device) -> "Windowed":
        """The attention of layers in which a token sees the last `window` tokens, itself included."""
        if (window, device) not in self.windows:
            self.windows[window, device] = self._windowed(window, device)
        return self.windows[window, device]

    def capped(self, softcap: float) -> "SharedPrefixLayout":
        """The same with soft-capped scores."""
        parts = {name: getattr(self, name) for name in ("prompts", "completions", "across")}
        return replace(self, **{name: replace(part, softcap=softcap) for name, part in parts.items()})

    def _windowed(self, window: int, device: torch.device) -> "Windowed":
        prompts = self.prompts.q_lengths
        ends, counts, own_lengths = list(accumulate(prompts)), iter(self.completions.tiles), self.completions.q_lengths
        keys = [torch.arange(self.prompt_tokens)]
        k_lengths, first, start = list(prompts), 0, self.prompt_tokens
        for end, length, asked in zip(ends, prompts, self.across.q_lengths, strict=True):
            seen = min(length, window - 1)
            for own in own_lengths[first : first + (count := next(counts) if asked else 0)]:
                keys += [torch.arange(end - seen, end), torch.arange(start, start + own)]
                k_lengths.append(seen + own)
                start += own
            first += count
        segments = Segments.of([*prompts, *own_lengths], k_lengths, window=window).to(device)
        if self.prompts.ahead is not None:
            segments = replace(segments, ahead=pad(self.prompts.ahead, (0, sum(own_lengths))))
        return Windowed(moved(torch.cat(keys), device), segments)


class Windowed(NamedTuple):
    """One causal attention of all tokens: each prompt to itself, each completion to its prompt's end and itself."""

    keys: Tensor
    """[Tk] int64: the token that each key is, a prompt's last ones once for every completion."""
    segments: Segments


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of T input tokens, N completion tokens to predict and S completions."""

    input_ids: Tensor
    """[T] int64, without each completion's last token, which predicts nothing."""
    position_ids: Tensor
    """[3, T] int64, M-RoPE; every completion restarts at max(prompt) + 1 on all axes."""
    pixel_values: Tensor | None
    """As `Prompt.pixel_values`, pictures of each prompt once; None without pictures."""
    image_grid_thw: Tensor | None
    """[images, 3] int64, on the host."""
    image_digests: tuple[bytes, ...]
    """`Prompt.image_digests` of all prompts; fewer than images if a prompt has none."""
    layout: SharedPrefixLayout
    rows: Tensor
    """[N] int64, the input token whose hidden state predicts each completion token; a group's first tokens share it."""
    targets: Tensor
    """[N] int64."""
    weights: Tensor
    """[N] float32."""
    mask: Tensor
    """[N] bool."""
    advantages: Tensor
    """[S] float32."""
    cu_seqlens: Tensor
    """[S + 1] int64, where each completion's tokens start in the [N] tensors."""
    sampling_logprobs: Tensor
    """[N] float32."""
    old_logprobs: Tensor | None
    """[N] float32, or None."""
    policy_scale: Tensor | None
    """[N] float32, or None."""
    entropy_weights: Tensor | None
    """[N] float32, or None."""
    owners: tuple[tuple[int, int], ...]
    """Per completion: the index of its group among the packed ones, and its index in the group."""
    ref_logprobs: Tensor | None
    """[N] float32; None where some completion lacks them."""

    def to(self, device: torch.device) -> "PackedBatch":
        """A copy whose tensors, but for the grids, are on `device`."""
        return replace(_moved(self, device), image_grid_thw=self.image_grid_thw)

    def split(self, flat: Tensor) -> list[Tensor]:
        """[N] values to one tensor [C] per completion, in the order of `owners`; `cu_seqlens` must be on the CPU."""
        return list(flat.split(self.cu_seqlens.diff().tolist()))


class _Piece(NamedTuple):
    """A group, or part of a group that exceeds the budget."""

    group: int
    completions: tuple[int, ...]
    tokens: int


def contributes(group: TrainingGroup, index: int, beta: float) -> bool:
    """Whether a completion can have a gradient: some token counts, and with beta 0 the advantage is not 0.

    Exact for every surrogate: each is proportional to the advantage, and masked-out tokens enter no term. With an
    entropy bonus every counted token takes part.
    """
    if not bool(group.masks[index].any()):
        return False
    return (
        beta != 0.0
        or group.entropy_weights is not None
        or (bool(group.advantages[index] != 0) and bool(group.token_weights[index].any()))
    )


def takes_part(group: TrainingGroup, index: int, skip_beta: float | None) -> bool:
    """Whether `pack` keeps a completion."""
    return skip_beta is None or contributes(group, index, skip_beta)


def pack(
    groups: Sequence[TrainingGroup],
    token_budget: int,
    *,
    skip_beta: float | None = None,
    dummy_image: Prompt | None = None,
) -> list[PackedBatch]:
    """Packs groups into micro-batches of at most `token_budget` input tokens, first fit by decreasing size.

    A group that exceeds the budget alone is split between completions, and its prompt is repeated in each part. A
    prompt with one completion is never split, however long. Deterministic; the sum over an optimizer step does not
    depend on the budget.

    Args:
        groups: their tensors are read on the host; with tensors on a GPU this waits for it.
        token_budget: input tokens of a micro-batch, prompts counted once.
        skip_beta: with the objective's beta, leaves out completions that cannot contribute to the gradient (see
            `contributes`) and prompts that keep none; None keeps all.
        dummy_image: a prompt added to every micro-batch without pictures, its output unused: if ranks wait for each
            other's gradients, all must run the vision tower.

    Raises:
        ValueError: `token_budget` is not positive.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget!r} is not valid: use 1 or more.")
    pieces: list[_Piece] = []
    for g, group in enumerate(groups):
        kept = [i for i in range(len(group.completions)) if takes_part(group, i, skip_beta)]
        pieces += _pieces(group, g, kept, token_budget)
    return [_collate(groups, chosen, dummy_image) for chosen in _first_fit(pieces, token_budget)]


def pack_examples(
    examples: Sequence[Example], token_budget: int, *, weight: float, dummy_image: Prompt | None = None
) -> list[PackedBatch]:
    """Packs examples as `pack` does prompts, whole; every target weighs `weight`."""
    pieces = [_Piece(i, (), len(example.prompt.input_ids)) for i, example in enumerate(examples)]
    groups = [TrainingGroup(example.prompt, (), torch.zeros(0), (), ()) for example in examples]
    batches = []
    for chosen in _first_fit(pieces, token_budget):
        starts = accumulate((piece.tokens for piece in chosen), initial=0)
        packed = [examples[piece.group] for piece in chosen]
        rows = torch.cat([example.rows + start for example, start in zip(packed, starts, strict=False)])
        batch = replace(
            _collate(groups, chosen, dummy_image),
            rows=rows,
            targets=torch.cat([example.targets for example in packed]),
            weights=torch.full((len(rows),), weight),
            mask=torch.ones(len(rows), dtype=torch.bool),
        )
        batches.append(batch)
    return batches


def _first_fit(pieces: Sequence[_Piece], token_budget: int) -> list[list[_Piece]]:
    """First fit by decreasing size; the pieces of a micro-batch in their own order."""
    bins: list[list[_Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        fit = next((b for b, free in enumerate(room) if piece.tokens <= free), len(bins))
        if fit == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[fit].append(piece)
        room[fit] -= piece.tokens
    return [sorted(chosen) for chosen in bins]


def idle_batch(dummy_image: Prompt | None) -> PackedBatch:
    """A micro-batch of weight zero, for a rank that has fewer than others."""
    one = torch.zeros(1)
    batch = _collate([], [], dummy_image or ONE_TOKEN)
    token = torch.zeros(1, dtype=torch.int64)
    return replace(
        batch,
        rows=token,
        targets=token,
        weights=one,
        mask=one.bool(),
        advantages=one,
        cu_seqlens=torch.tensor([0, 1]),
        sampling_logprobs=one,
        ref_logprobs=one,
    )


def _pieces(group: TrainingGroup, g: int, kept: Sequence[int], token_budget: int) -> list[_Piece]:
    prompt = len(group.prompt.input_ids)
    pieces: list[_Piece] = []
    chosen: list[int] = []
    tokens = prompt
    for i in kept:
        if (whole := group.completions[i].whole) is not None:
            pieces.append(_Piece(g, (i,), len(whole.input_ids)))
            continue
        inputs = len(group.completions[i].token_ids) - 1
        if chosen and tokens + inputs > token_budget:
            pieces.append(_Piece(g, tuple(chosen), tokens))
            chosen, tokens = [], prompt
        chosen.append(i)
        tokens += inputs
    return [*pieces, _Piece(g, tuple(chosen), tokens)] if chosen else pieces


def _prompt_of(group: TrainingGroup, completions: Sequence[int]) -> Prompt:
    """What a piece begins with; a completion with pictures is a piece of its own, and all of it."""
    whole = group.completions[completions[0]].whole if completions else None
    return group.prompt if whole is None else whole


def _collate(groups: Sequence[TrainingGroup], pieces: Sequence[_Piece], dummy_image: Prompt | None) -> PackedBatch:
    prompts = [_prompt_of(groups[piece.group], piece.completions) for piece in pieces]
    if dummy_image is not None and all(prompt.pixel_values is None for prompt in prompts):
        prompts.append(dummy_image)
    owners = tuple((piece.group, i) for piece in pieces for i in piece.completions)
    prompt_lengths = [len(prompt.input_ids) for prompt in prompts]
    prompt_ends = list(accumulate(prompt_lengths))
    prompt_tokens = sum(prompt_lengths)

    ids, positions = [p.input_ids for p in prompts], [p.position_ids for p in prompts]
    rows, inputs, start = [], [0] * len(prompts), prompt_tokens
    lengths: list[list[int]] = [[] for _ in prompts]
    for p, piece in enumerate(pieces):
        restart = int(prompts[p].position_ids.max()) + 1
        for i in piece.completions:
            token_ids = groups[piece.group].completions[i].token_ids
            if groups[piece.group].completions[i].whole is not None:
                rows.append(torch.arange(prompt_ends[p] - len(token_ids), prompt_ends[p]))
                continue
            length = len(token_ids) - 1
            ids.append(token_ids[:-1])
            positions.append(torch.arange(restart, restart + length).expand(3, -1))
            rows.append(torch.cat([torch.tensor([prompt_ends[p] - 1]), torch.arange(start, start + length)]))
            start += length
            inputs[p] += length
            lengths[p] += [length] if length else []
    layout = SharedPrefixLayout(
        prompt_tokens,
        Segments.of(prompt_lengths),
        Segments.of([n for own in lengths for n in own], tiles=[len(own) for own in lengths if own]),
        Segments.of(inputs, prompt_lengths),
    )
    sequences = [(groups[g], i) for g, i in owners]

    def optional(name: str) -> Tensor | None:
        found = [pieces[i] for group, i in sequences if (pieces := getattr(group, name)) is not None]
        assert len(found) in (0, len(sequences)), f"groups with and without {name} in one update"
        return _joined(found) if found else None

    found = [group.completions[i].ref_logprobs for group, i in sequences]
    of_reference = [one for one in found if one is not None]
    pixel_values = [p.pixel_values for p in prompts if p.pixel_values is not None]
    grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
    none = torch.zeros(0)
    return PackedBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        pixel_values=torch.cat(pixel_values) if pixel_values else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        image_digests=tuple(digest for p in prompts for digest in p.image_digests),
        layout=layout,
        rows=torch.cat(rows or [none.long()]),
        targets=torch.cat([group.completions[i].token_ids for group, i in sequences] or [none.long()]),
        weights=torch.cat([group.token_weights[i] for group, i in sequences] or [none]),
        mask=torch.cat([group.masks[i] for group, i in sequences] or [none.bool()]),
        advantages=torch.stack([group.advantages[i] for group, i in sequences]) if sequences else none,
        cu_seqlens=offsets([len(group.completions[i].token_ids) for group, i in sequences]).long(),
        sampling_logprobs=torch.cat([group.completions[i].sampling_logprobs for group, i in sequences] or [none]),
        old_logprobs=optional("old_logprobs"),
        policy_scale=optional("policy_scale"),
        entropy_weights=optional("entropy_weights"),
        ref_logprobs=_joined(of_reference) if found and len(of_reference) == len(found) else None,
        owners=owners,
    )


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """One behind the other, where the first is: what comes from a checkpoint is on the host, what was asked now not."""
    return torch.cat([piece.to(pieces[0].device) for piece in pieces])


def _moved(record: Any, device: torch.device) -> Any:
    changed: dict[str, Any] = {}
    for name in (part.name for part in fields(record)):
        value = getattr(record, name)
        if isinstance(value, Tensor):
            changed[name] = moved(value, device)
        elif isinstance(value, Segments):
            changed[name] = value.to(device)
        elif isinstance(value, SharedPrefixLayout):
            changed[name] = _moved(value, device)
    return replace(record, **changed)
