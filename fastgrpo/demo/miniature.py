"""The inputs of the paper's experiment in miniature: `python -m fastgrpo.demo.miniature --out DIR [--seed S]`.

Written into DIR, in minutes and from a seed: `base` and `instruct`, two models; `train.parquet`, rows in SAT's schema;
`heldout.parquet`, questions in CV-Bench's; `behaviour.json`, how each model answers these. A folder that is already
whole is left as it is.

*The base* is the demo's, trained further on another mix of documents. It can look at the objects of a question one by
one and compare ("across: red 2, blue 5. so left."), and does so in about a seventh of its answers; in a third of these
it then checks again ("wait, let me check again: …"). In what it read, three first looks in ten were hasty, and the
answers that followed from them wrong; hasty looks were checked more often, and second ones were careful. Else it
guesses, with the accuracy of chance. Half of all answers are in tags, reasoned ones no more often than guesses: a
reward for the form alone pays for neither.

*The instruct model* is that base, tuned a little longer: nearly all answers there are the right option at once, in
tags, without a look. It is asked in the base's words, not in a chat template, so that a habit is all that differs.

Whether step-by-step answers, checks and length grow from the reward is left to training: nothing here pays for them.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration

from fastgrpo.atomic_files import publish
from fastgrpo.cli.console import say
from fastgrpo.cli.options import require_writable
from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.demo.base_model import BASE_MODEL_PATH, save_model
from fastgrpo.demo.corpus import AnswerKind, Mix, answer_kind
from fastgrpo.demo.documents import DEMO_KINDS, load_pool
from fastgrpo.demo.pretrain import PRETRAIN_SEED, train
from fastgrpo.demo.scenes import write_cvbench_parquet, write_sat_parquet
from fastgrpo.model.load import load_policy, load_processing
from fastgrpo.sampler.engine import SamplerEngine
from fastgrpo.scoring.answers import parse_answer
from fastgrpo.scoring.tagged import is_correct
from fastgrpo.types import SamplingParams

BASE_MIX = Mix(
    opener="", tagged_guesses=(0.5,) * 3, tagged_reasons=0.5, count_each=True, slips=0.3, rechecks=(0.25, 0.6)
)
INSTRUCT_MIX = replace(BASE_MIX, tagged_guesses=(1.0,) * 3, tagged_reasons=1.0, guesses_know=True)
MAX_TOKENS = 64
TRAIN_SEED, HELD_OUT_SEED = 3000, 3001


@dataclass(frozen=True)
class Stage:
    """One model's training."""

    mix: Mix
    shares: tuple[float, ...]
    """Shares of reasoned completions, each for an equal part of the steps."""
    steps: int
    pictures: int
    stream: int
    """Which pictures: none are those of the demo's base or of another stage."""
    peak: float
    """Learning rate."""
    batch_size: int = 48

    def share(self, step: int, steps: int) -> float:
        return self.shares[step * len(self.shares) // steps]


BASE = Stage(BASE_MIX, shares=(0.7, 0.7, 0.15), steps=480, pictures=4000, stream=1000, peak=1.5e-3)
INSTRUCT = Stage(INSTRUCT_MIX, shares=(0.02,), steps=80, pictures=1500, stream=2000, peak=5e-4)


@dataclass(frozen=True)
class Sizes:
    """What `build` makes."""

    base: Stage = BASE
    instruct: Stage = INSTRUCT
    train_rows: int = 1200
    questions: int = 400
    """Held-out questions."""


def build(out: Path, seed: int = 0, sizes: Sizes = Sizes()) -> None:
    """Makes the two models and the two files, unless `out` has them with this seed and these sizes already.

    Raises:
        ValueError: `out` cannot be written, or holds something else.
    """
    recipe = json.loads(json.dumps({"seed": seed, **asdict(sizes)}))
    if _built(out, recipe):
        say(f"{out} is built")
        return
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    require_writable(aside)
    write_sat_parquet(aside / "train.parquet", sizes.train_rows, TRAIN_SEED, kinds=DEMO_KINDS)
    write_cvbench_parquet(aside / "heldout.parquet", sizes.questions, HELD_OUT_SEED, kinds=DEMO_KINDS)
    tune(BASE_MODEL_PATH, aside / "base", sizes.base, seed)
    tune(aside / "base", aside / "instruct", sizes.instruct, seed)
    figures = {name: behaviour(aside / name, aside / "heldout.parquet") for name in ("base", "instruct")}
    (aside / "behaviour.json").write_text(json.dumps(figures, indent=2) + "\n")
    (aside / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    publish(aside, out)


def _built(out: Path, recipe: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    made = out / "recipe.json"
    if made.is_file() and json.loads(made.read_text()) == recipe:
        return True
    raise ValueError(f"out={str(out)!r} was not made with this seed and these sizes: remove it, or choose another.")


def tune(source: Path, out: Path, stage: Stage, seed: int) -> None:
    """Trains the model in folder `source` as the stage says and writes it to `out`."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    processing = load_processing(str(source))
    builder = PromptBuilder(processing.tokenizer, processing.image_processor)
    pool = load_pool(PRETRAIN_SEED + stage.stream + seed, stage.pictures, builder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(source)
    losses = []
    steps = train(
        model,
        processing.tokenizer,
        pool,
        steps=stage.steps,
        batch_size=stage.batch_size,
        peak=stage.peak,
        seed=seed,
        share=stage.share,
        mix=stage.mix,
    )
    for step, loss in steps:
        losses.append(loss)
        if step % 50 == 0 or step == stage.steps:
            say(f"{out.name}: step {step} of {stage.steps}, loss {np.mean(losses[-50:]):.3f}")
    save_model(out, model, processing.tokenizer)


def behaviour(model: Path, questions: Path, samples: int = 16) -> dict[AnswerKind, dict[str, float | None]]:
    """Answers drawn at temperature 1, by kind: their `share` of all, the share of these in tags (`tagged`), the
    `accuracy` of those in tags as the reward reads them, and the mean number of `tokens`; None of no answers."""
    processing, policy = load_processing(str(model)), load_policy(str(model)).eval()
    builder = PromptBuilder(processing.tokenizer, processing.image_processor)
    rows = load_rows(str(questions))
    prompts = [builder.build(rows.convert(*rows[index])) for index in range(len(rows))]
    engine = SamplerEngine(policy, processing.tokenizer)
    engine.sync()
    answers: dict[AnswerKind, list[tuple[bool, bool, int]]] = {"guess": [], "look": [], "check": []}
    for prompt, completions in engine.generate(prompts, samples, SamplingParams(MAX_TOKENS), 0):
        for completion in completions:
            answer = parse_answer(completion.text)
            right = is_correct(answer, prompt.columns["solution"], prompt.columns["choices"])
            answers[answer_kind(completion.text)].append((answer is not None, right, len(completion.token_ids)))
    total = sum(map(len, answers.values()))
    return {
        kind: {
            "share": len(drawn) / total,
            "tagged": _mean([tagged for tagged, _, _ in drawn]),
            "accuracy": _mean([right for tagged, right, _ in drawn if tagged]),
            "tokens": _mean([length for _, _, length in drawn]),
        }
        for kind, drawn in answers.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the models and data of the paper's experiment in miniature.")
    parser.add_argument("--out", required=True, type=Path, help="folder for the models and data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
