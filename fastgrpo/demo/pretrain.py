"""Trains the demo's base model from scratch: `python -m fastgrpo.demo.pretrain --out DIR [--steps N] [--seed S]`.

What the shipped base has learnt, and what is therefore left for GRPO:

1. *Seeing.* In the first 28 % of the steps a picture is followed by its description alone ("across: red 2, blue 5.
   down: blue 1, red 4."). During all steps an auxiliary head predicts colour, shape and place at every image token; it
   is discarded afterwards.
2. *Reasoning.* Then questions and completions of `fastgrpo.demo.corpus` follow: most completions are reasoned at first
   (`EARLY`), most are guesses at the end (`LATE`). So the base has seen correct reasoning, as base models trained on
   the web have, and can produce it, but seldom does: by default it guesses, with chance accuracy, mostly without tags.

GRPO therefore teaches this base neither to see nor to compare: it makes the reasoned behaviour frequent, from the
reward alone. Training and evaluation of the demo use pictures that pretraining did not.

The shipped weights come from this script with its defaults (seed 0, 2,000 steps, about 17 minutes on one core).
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgrpo.data.prompts import BASE_PROMPT, PromptBuilder
from fastgrpo.data.row_dataset import as_rows
from fastgrpo.demo.base_model import build_config, build_image_processor_config, build_tokenizer, save_model
from fastgrpo.demo.corpus import DEMO_MIX, PLACES, Mix, corpus_texts, place
from fastgrpo.demo.documents import DEMO_KINDS, Example, load_pool, make_batch, pixel_values, question_row
from fastgrpo.demo.scenes import COLOURS, SHAPES, cvbench_row, scene_question
from fastgrpo.evaluation.benchmark import evaluate
from fastgrpo.plain.engine import PlainEngine

PRETRAIN_SEED = 90_000_000
"""Seed of the pictures of pretraining. Training and evaluation of the demo use other seeds."""
EARLY, LATE = 0.6, 0.16
"""Shares of reasoned completions."""
DESCRIBE_UNTIL, EARLY_UNTIL = 0.28, 0.68
"""Questions begin after the first share of the steps; after the second, the share of reasoned completions is `LATE`."""


LABEL_SIZES = (len(COLOURS) + 1, len(SHAPES), PLACES, PLACES)
"""Classes of the auxiliary head: colour (the last is "nothing here"), shape, place across, place down."""


def image_token_labels(examples: Sequence[Example]) -> Tensor:
    """[image tokens, 4] int64: the labels listed at `LABEL_SIZES`, of the object centred there, or of none."""
    labels = []
    for example in examples:
        rows, columns = (int(side) // 2 for side in example.grid[0, 1:])
        label = torch.full((rows, columns, 4), -100)
        label[..., 0] = len(COLOURS)
        label[..., 2] = torch.tensor([place((column + 0.5) / columns) - 1 for column in range(columns)])
        label[..., 3] = torch.tensor([place((row + 0.5) / rows) - 1 for row in range(rows)])[:, None]
        for thing in example.question.objects:
            label[int(thing.y * rows), int(thing.x * columns)] = torch.tensor(
                [
                    list(COLOURS).index(thing.colour),
                    SHAPES.index(thing.shape),
                    place(thing.x) - 1,
                    place(thing.y) - 1,
                ]
            )
        labels.append(label.view(-1, 4))
    return torch.cat(labels)


class ImageTokens(nn.Module):
    """The auxiliary head, on the vision tower's output, which a forward hook keeps."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(LABEL_SIZES))
        self.seen: Tensor | None = None
        model.model.visual.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.seen = getattr(output, "pooler_output", output)  # [image tokens, hidden]

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Summed cross entropy of the four labels."""
        assert self.seen is not None
        labels = image_token_labels(examples)
        logits = self.head(self.seen).split(LABEL_SIZES, dim=1)
        return torch.stack([F.cross_entropy(logits[i], labels[:, i], ignore_index=-100) for i in range(4)]).sum()


def initialise(model: Qwen2VLForConditionalGeneration) -> None:
    """Scales weights by fan-in. The default standard deviation of 0.02 suits layers ten times as wide."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and module is not model.lm_head:
            nn.init.normal_(module.weight, std=0.7 * module.weight[0].numel() ** -0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.05)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps or a quarter of them all, then a cosine to 2 % of the peak."""
    warm_up = min(100, steps // 4)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


def careful_share(step: int, steps: int) -> float | None:
    if step < DESCRIBE_UNTIL * steps:
        return None
    return EARLY if step < EARLY_UNTIL * steps else LATE


def train(
    model: Qwen2VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    peak: float,
    seed: int,
    share: Callable[[int, int], float | None] = careful_share,
    mix: Mix = DEMO_MIX,
) -> Iterator[tuple[int, float]]:
    """Yields (steps done, language-modelling loss) after each step.

    Args:
        peak: the learning rate.
        share: from (step, steps) to `careful` of `make_batch`.
        mix: the wording of completions.
    """
    rng = np.random.default_rng(seed)
    image_tokens = ImageTokens(model)
    parameters = [*model.parameters(), *image_tokens.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        examples = [pool[i] for i in rng.integers(len(pool), size=batch_size)]
        batch = make_batch(examples, tokenizer, rng, share(step, steps), mix)
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=pixel_values(examples),
            image_grid_thw=torch.cat([example.grid for example in examples]),
        ).logits
        learnt = batch.labels[:, 1:] != -100
        loss = F.cross_entropy(logits[:, :-1][learnt], batch.labels[:, 1:][learnt])
        optimizer.zero_grad()
        (loss + 0.5 * image_tokens.loss(examples)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield step + 1, loss.item()


def print_behaviour(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, builder: PromptBuilder, questions: int
) -> None:
    """The model's scores on held-out questions in CV-Bench's schema, by kind of question."""
    engine = PlainEngine(model.eval(), tokenizer)
    for kind in DEMO_KINDS:
        rows = [cvbench_row(scene_question(PRETRAIN_SEED, i, split="heldout", kinds=(kind,))) for i in range(questions)]
        result = evaluate(engine, builder, as_rows(rows), max_new_tokens=48, pass_at_k=8, shuffles=1)
        assert result.pass_at_k is not None
        assert result.shuffled is not None
        print(
            f"{kind:12s} {result.total} length {result.mean_length:.1f} reflective {result.reflection_rate:.3f} "
            f"pass@8 {result.pass_at_k[1]:.3f} shuffled pictures {result.shuffled.answered_accuracy}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo's base model.")
    parser.add_argument("--out", required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--questions", type=int, default=200, help="held-out questions per kind at the end")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)

    stream = PRETRAIN_SEED + 1 + arguments.seed
    asked = [scene_question(stream, index, kinds=DEMO_KINDS) for index in range(2000)]
    prompts = [BASE_PROMPT.format(question=question_row(question).question) for question in asked]
    tokenizer = build_tokenizer(corpus_texts(asked, prompts))
    settings = build_image_processor_config()
    del settings["image_processor_type"]
    builder = PromptBuilder(tokenizer, Qwen2VLImageProcessorPil(**settings))
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary of {len(tokenizer)}", flush=True)
    pool = load_pool(stream, arguments.pictures, builder)

    started, losses = time.perf_counter(), []
    options = {"batch_size": arguments.batch_size, "peak": arguments.learning_rate, "seed": arguments.seed}
    for step, loss in train(model, tokenizer, pool, steps=arguments.steps, **options):
        losses.append(loss)
        if step % 100 == 0:
            each = (time.perf_counter() - started) / step
            print(f"step {step}  loss {np.mean(losses[-100:]):.3f}  {each:.2f} s a step", flush=True)
    save_model(arguments.out, model, tokenizer)
    print_behaviour(model, tokenizer, builder, arguments.questions)


if __name__ == "__main__":
    main()
