"""Trains the demo's base model from nothing: `python -m fastgrpo.demo.pretrain --out DIR [--steps N] [--seed S]`."""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgrpo.data.cvbench import convert_cvbench
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.data.rows import Row
from fastgrpo.data.sat import convert_sat
from fastgrpo.data.synthetic import KINDS, Kind, SceneQuestion, cvbench_row, render, sat_row, scene_question
from fastgrpo.demo.base_model import build_config, build_image_processor_config, build_tokenizer, save_model
from fastgrpo.demo.corpus import Mixture, completion, corpus_texts, description, place

PRETRAIN_SEED = 90_000_000
"""Pictures of pretraining come from this stream, which neither training nor evaluation of the demo uses."""
EARLY = Mixture(careful=0.5, second_thought=0.1)
LATE = Mixture(careful=0.12, second_thought=0.08)
DEMO_KINDS: tuple[Kind, ...] = ("count", "left_right", "above_below", "depth")


def question_row(question: SceneQuestion) -> Row:
    """Every other question as a row of SAT, the rest as rows of CV-Bench, so that both wordings are known."""
    if question.index % 2:
        return convert_cvbench(cvbench_row(question), question.index)
    return convert_sat(sat_row(question), question.index)


@dataclass
class Example:
    """A question ready for the model. `patches` [P, 588] float16: one of the two equal temporal halves."""

    question: SceneQuestion
    input_ids: Tensor
    position_ids: Tensor
    patches: Tensor
    grid: Tensor


class Examples(Dataset):
    def __init__(self, seed: int, count: int, builder: PromptBuilder) -> None:
        self.seed, self.count, self.builder = seed, count, builder

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        question = scene_question(self.seed, index, kinds=DEMO_KINDS)
        prompt = self.builder.build(question_row(question))
        assert prompt.pixel_values is not None and prompt.image_grid_thw is not None
        patches = prompt.pixel_values.view(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588).half()
        return Example(question, prompt.input_ids, prompt.position_ids, patches, prompt.image_grid_thw)


def pixel_values(examples: Sequence[Example]) -> Tensor:
    """[patches, 1176] float32, as the image processor made them."""
    patches = torch.cat([example.patches for example in examples]).float().view(-1, 3, 1, 196)
    return patches.expand(-1, -1, 2, -1).reshape(-1, 1176)


@dataclass
class Batch:
    input_ids: Tensor
    """[B, T] int64, padded on the right."""
    position_ids: Tensor
    """[3, B, T] int64."""
    labels: Tensor
    """[B, T] int64; -100 on prompts and padding."""


def make_batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, mixture: Mixture
) -> Batch:
    """Appends a freshly drawn completion and a description to every prompt."""
    end = tokenizer.eos_token
    texts = [completion(e.question, rng, mixture) + end + description(e.question, rng) + end for e in examples]
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
        position_ids[:, row, start:stop] = example.position_ids[0, -1] + 1 + torch.arange(len(tail))
    return Batch(input_ids, position_ids, labels)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2 % of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 100) / max(1, steps - 100))))
