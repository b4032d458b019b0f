"""A rollout that feeds several optimizer steps, half used: what a checkpoint keeps of it, a file a rank.

Kept are the completions with everything the loss needs; prompts, with their pictures, are built anew from their rows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.types import Completion, Prompt, TrainingGroup

FOLDER = "rollout"
"""In a checkpoint amid a rollout."""
OF_PROMPT = ("input_ids", "position_ids")
OF_WHOLE = (*OF_PROMPT, "pixel_values", "image_grid_thw")
"""Tensors of a prompt, and of a completion's `whole`, that are kept."""
PER_TOKEN = ("token_ids", "logprobs", "sampling_logprobs", "ref_logprobs", "token_weights", "masks", "old_logprobs")

Slices = list[list[TrainingGroup]]
"""The groups of each slice; one that comes again is the same list."""


def save_slices(slices: Slices, folder: Path, rank: int, ranks: int) -> None:
    """Writes what a rank has still to train on; nothing where there is none."""
    if not slices:
        return
    distinct = list({id(one): one for one in slices}.values())
    order = [next(i for i, other in enumerate(distinct) if other is one) for one in slices]
    tensors = {
        f"{s}.{g}.{name}": tensor
        for s, one in enumerate(distinct)
        for g, group in enumerate(one)
        for name, tensor in _tensors_of(group).items()
    }
    groups = [[_words_of(group) for group in one] for one in distinct]
    file = _file(folder, rank, ranks)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"updates": json.dumps({"order": order, "groups": groups})})


def load_slices(checkpoint: Path, rank: int, ranks: int, prompts_of: Callable[[list[int]], Sequence[Prompt]]) -> Slices:
    """What `save_slices` wrote on so many ranks; nothing where it wrote nothing.

    Args:
        prompts_of: builds the prompts of rows, by their ids.
    """
    file = _file(checkpoint, rank, ranks)
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as saved:
        layout = json.loads(saved.metadata()["updates"])
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    rows = {words["row_id"] for one in layout["groups"] for words in one}
    prompts = {prompt.row_id: prompt for prompt in prompts_of(sorted(rows))}
    distinct = [
        [
            _group_of(prompts[words["row_id"]], words, _under(f"{s}.{g}.", tensors))
            for g, words in enumerate(one)
            if words["row_id"] in prompts
        ]
        for s, one in enumerate(layout["groups"])
    ]
    return [distinct[i] for i in layout["order"]]


def _file(folder: Path, rank: int, ranks: int) -> Path:
    return folder / FOLDER / f"{rank}_of_{ranks}.safetensors"


def _tensors_of(group: TrainingGroup) -> dict[str, Tensor]:
    """Per-token fields of all completions in a row each, [sum of C]; copies, since a file may not share memory."""
    completions = group.completions
    fields: dict[str, Sequence[Tensor]] = {
        "token_ids": [completion.token_ids for completion in completions],
        "logprobs": [completion.logprobs for completion in completions],
        "sampling_logprobs": [completion.sampling_logprobs for completion in completions],
        "ref_logprobs": [c.logprobs if c.ref_logprobs is None else c.ref_logprobs for c in completions],
        "token_weights": group.token_weights,
        "masks": group.masks,
    }
    if group.old_logprobs is not None:
        fields["old_logprobs"] = group.old_logprobs
    prompts = {"prompt.": group.prompt} | {f"whole.{i}.": one.whole for i, one in enumerate(completions) if one.whole}
    kept = {
        prefix + name: tensor.cpu().contiguous().clone()
        for prefix, prompt in prompts.items()
        for name in (OF_PROMPT if prefix == "prompt." else OF_WHOLE)
        if (tensor := getattr(prompt, name)) is not None
    }
    flat = {name: torch.cat([piece.cpu() for piece in pieces]) for name, pieces in fields.items()}
    return {"advantages": group.advantages.cpu().clone(), **kept, **flat}


def _words_of(group: TrainingGroup) -> dict[str, Any]:
    return {
        "row_id": group.prompt.row_id,
        "lengths": [len(completion.token_ids) for completion in group.completions],
        "texts": [completion.text for completion in group.completions],
        "finish_reasons": [completion.finish_reason for completion in group.completions],
        "have_reference": [completion.ref_logprobs is not None for completion in group.completions],
        "digests": [
            [digest.hex() for digest in completion.whole.image_digests] if completion.whole else None
            for completion in group.completions
        ],
    }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _group_of(prompt: Prompt, words: dict[str, Any], tensors: dict[str, Tensor]) -> TrainingGroup:
    pieces = {name: flat.split(words["lengths"]) for name, flat in tensors.items() if name in PER_TOKEN}
    # An environment, or a rollout function, may have made another prompt of the row.
    read: dict[str, Any] = _under("prompt.", tensors)
    if read and not torch.equal(read["input_ids"], prompt.input_ids):
        prompt = replace(prompt, **read)

    def whole(i: int) -> Prompt | None:
        digests = words["digests"][i] if "digests" in words else None  # which older checkpoints lack
        if digests is None:
            return None
        seen: dict[str, Any] = _under(f"whole.{i}.", tensors)
        return replace(prompt, **seen, image_digests=tuple(map(bytes.fromhex, digests)))

    def of_reference(i: int) -> Tensor | None:
        known = "have_reference" in words and words["have_reference"][i]  # which older checkpoints lack
        return pieces["ref_logprobs"][i] if known else None

    told = zip(words["texts"], words["finish_reasons"], strict=True)
    completions = tuple(
        Completion(
            prompt.row_id,
            i,
            *(pieces["token_ids"][i], text, reason, pieces["logprobs"][i], pieces["sampling_logprobs"][i]),
            ref_logprobs=of_reference(i),
            whole=whole(i),
        )
        for i, (text, reason) in enumerate(told)
    )
    return TrainingGroup(
        prompt,
        completions,
        tensors["advantages"],
        pieces["token_weights"],
        pieces["masks"],
        pieces.get("old_logprobs"),
    )
