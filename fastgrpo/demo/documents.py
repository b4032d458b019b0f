"""Documents of the corpus as tensors. Pictures are rendered once; texts are drawn anew for every batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from fastgrpo.data.cvbench import convert_cvbench
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.data.sat import convert_sat
from fastgrpo.data.worker_end import end_with_parent
from fastgrpo.demo.corpus import DEMO_MIX, Mix, completion, description
from fastgrpo.demo.scenes import Kind, SceneQuestion, cvbench_row, render, sat_row, scene_question

DEMO_KINDS: tuple[Kind, ...] = ("count", "left_right", "above_below", "depth")
"""The kinds of question that a model of this size learns."""


@dataclass(frozen=True)
class Example:
    """A question as model inputs."""

    question: SceneQuestion
    input_ids: Tensor
    """[P] int64, the prompt."""
    position_ids: Tensor
    """[3, P] int64."""
    patches: Tensor
    """[patches, 588] float16: one of the two equal temporal halves."""
    grid: Tensor
    """[1, 3] int64."""


def question_row(question: SceneQuestion) -> Row:
    """A row of SAT for even questions and of CV-Bench for odd ones, so that the model sees both wordings."""
    if question.index % 2:
        return convert_cvbench(cvbench_row(question, image=render(question)), question.index)
    return convert_sat(sat_row(question, image=render(question)), question.index)


class Examples(Dataset[Example]):
    """Examples 0 … count-1 of a seed. Each depends on seed and index alone."""

    def __init__(self, seed: int, count: int, builder: PromptBuilder) -> None:
        self.seed, self.count, self.builder = seed, count, builder

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        question = scene_question(self.seed, index, kinds=DEMO_KINDS)
        prompt = self.builder.build(question_row(question))
        assert prompt.pixel_values is not None
        assert prompt.image_grid_thw is not None
        patches = prompt.pixel_values.view(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588).half()
        return Example(question, prompt.input_ids, prompt.position_ids, patches, prompt.image_grid_thw)


def load_pool(seed: int, count: int, builder: PromptBuilder) -> list[Example]:
    """Renders all pictures ahead, in two worker processes."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    examples_of = Examples(seed, count, builder)
    loader = DataLoader(examples_of, batch_size=64, num_workers=2, collate_fn=list, worker_init_fn=end_with_parent)
    pool = []
    for examples in loader:  # cloned, since shared memory holds one file open per tensor
        pool += [
            Example(e.question, *(t.clone() for t in (e.input_ids, e.position_ids, e.patches, e.grid)))
            for e in examples
        ]
    return pool


def pixel_values(examples: Sequence[Example]) -> Tensor:
    """[patches, 1176] float32, as the image processor made them."""
    patches = torch.cat([example.patches for example in examples]).float().view(-1, 3, 1, 196)
    return patches.expand(-1, -1, 2, -1).reshape(-1, 1176)


@dataclass(frozen=True)
class Batch:
    """Prompts followed by the texts to learn, padded on the right."""

    input_ids: Tensor
    """[B, T] int64."""
    position_ids: Tensor
    """[3, B, T] int64."""
    labels: Tensor
    """[B, T] int64; -100 on prompts and padding."""


def make_batch(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    careful: float | None,
    mix: Mix = DEMO_MIX,
) -> Batch:
    """Documents with newly drawn texts.

    Args:
        careful: share of reasoned completions; None leaves out question and completion, so that only the description
            follows the picture.
        mix: the wording of completions.
    """
    end = tokenizer.eos_token
    texts = [description(example.question, rng) + end for example in examples]
    if careful is None:
        examples = [_picture_only(example, tokenizer) for example in examples]
    else:
        texts = [completion(e.question, rng, careful, mix) + end + t for e, t in zip(examples, texts, strict=True)]
    tails = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(len(e.input_ids) + len(tail) for e, tail in zip(examples, tails, strict=True))
    input_ids = torch.full((len(examples), longest), tokenizer.pad_token_id)
    position_ids = torch.zeros(3, len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, (example, tail) in enumerate(zip(examples, tails, strict=True)):
        start, stop = len(example.input_ids), len(example.input_ids) + len(tail)
        input_ids[row, :start], input_ids[row, start:stop] = example.input_ids, tail
        labels[row, start:stop] = tail
        position_ids[:, row, :start] = example.position_ids
        position_ids[:, row, start:stop] = example.position_ids.max() + 1 + torch.arange(len(tail))
    return Batch(input_ids, position_ids, labels)


def _picture_only(example: Example, tokenizer: PreTrainedTokenizerFast) -> Example:
    is_end = example.input_ids == tokenizer.convert_tokens_to_ids("<|vision_end|>")
    stop = int(is_end.nonzero()[0]) + 1
    return replace(example, input_ids=example.input_ids[:stop], position_ids=example.position_ids[:, :stop])
