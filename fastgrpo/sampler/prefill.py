"""Prefills prompts into the KV cache: once per group, a bounded number of tokens at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastgrpo_profiling import span
from torch import Tensor

from fastgrpo.model.segments import moved
from fastgrpo.model.vision import image_features
from fastgrpo.model.vision_cache import VisionCache
from fastgrpo.sampler.decoder import KVCache
from fastgrpo.sampler.packed_decoder import Chunk, PackedDecoder
from fastgrpo.sampler.sequence import PromptGroup


class Piece(NamedTuple):
    """Tokens `start` … `end` of a group's prompt."""

    group: PromptGroup
    start: int
    end: int


def plan_passes(groups: Sequence[PromptGroup], max_tokens: int) -> Iterator[list[Piece]]:
    """Passes of at most `max_tokens` tokens; a prompt that exceeds what is left of a pass is split over passes."""
    pieces: list[Piece] = []
    room = max_tokens
    for group in groups:
        start = 0
        while start < group.length:
            end = min(group.length, start + room)
            pieces.append(Piece(group, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], max_tokens
    if pieces:
        yield pieces


class Prefill:
    """Runs prompts through the vision tower and the packed decoder."""

    def __init__(
        self,
        decoder: PackedDecoder,
        tower: Any,
        image_token: Any,
        max_tokens: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        vision_cache: VisionCache | None,
    ) -> None:
        """`image_token`: a picture's placeholder; `max_tokens`: of a pass; `autocast`: context of the tower."""
        self.decoder = decoder
        self.tower = tower
        self.image_token = image_token
        self.max_tokens = max_tokens
        self.autocast = autocast
        self.vision_cache = vision_cache

    def run(self, groups: Sequence[PromptGroup], cache: KVCache, page_size: int) -> None:
        """Fills the pages of the groups' prompts and sets their `first_logits`."""
        embedded: dict[int, Tensor] = {}  # [P, H] of each prompt that is partly prefilled
        for pieces in plan_passes(groups, self.max_tokens):
            new = [piece.group for piece in pieces if piece.start == 0]
            embedded |= {id(group): rows for group, rows in zip(new, self._embed(new), strict=True)}
            hidden = torch.cat([embedded[id(group)][start:end] for group, start, end in pieces])
            positions = torch.cat([group.prompt.position_ids[:, start:end] for group, start, end in pieces], dim=1)
            chunks, slots = [], []
            for group, start, end in pieces:
                pages = torch.tensor(group.pages)
                at = torch.arange(start, end)
                slots.append(pages[at // page_size] * page_size + at % page_size)
                chunks.append(Chunk(start, end, moved(pages[: -(-end // page_size)], hidden.device)))
            device = hidden.device
            last = self.decoder.prefill(
                hidden, moved(positions, device), moved(torch.cat(slots), device), chunks, cache
            )
            ended = [i for i, piece in enumerate(pieces) if piece.end == piece.group.length]
            logits = self.decoder.head(last[ended])
            for row, i in enumerate(ended):
                pieces[i].group.first_logits = logits[row : row + 1]
                del embedded[id(pieces[i].group)]

    def _embed(self, groups: Sequence[PromptGroup]) -> list[Tensor]:
        """Per prompt, its embeddings [P, H] with the pictures' features at their placeholders."""
        prompts = [group.prompt for group in groups]
        embeddings = [F.embedding(moved(p.input_ids, self.decoder.device), self.decoder.embed) for p in prompts]
        if all(p.pixel_values is None for p in prompts):
            return embeddings
        with span("rollout/vision"), self.autocast():
            features = image_features(self.tower, prompts, self.vision_cache)
        for prompt, rows, seen in zip(prompts, embeddings, features, strict=True):
            if seen is not None:
                places = (prompt.input_ids == self.image_token).nonzero().squeeze(1)
                rows[moved(places, rows.device)] = seen.to(rows)
        return embeddings
