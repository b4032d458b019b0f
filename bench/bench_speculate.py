"""Speculation: rollouts of the demo's models that guess against the same ones that do not.

    python bench/bench_speculate.py --models BASE runs/demo/checkpoint-100 runs/demo

Each model draws for the demo's own prompts, 8 × 8 a rollout as the demo does, both sides in turn; last, one with random
weights for random words, where nothing can be guessed. The guesser has seen a few rollouts before one counts.
Time is that of the process, pictures and prompts included, so that other work on the machine enters little; steps are
decode steps until the last completion ends.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Result, parser, print_table
from workloads import NoTexts, Workload, build_model, build_prompts

from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.demo.base_model import BASE_MODEL_PATH
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_sat_parquet
from fastgrpo.model.load import load_merged, load_processing
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions
from fastgrpo.types import Prompt, Rollout, SamplingParams

GROUP, MAX_NEW_TOKENS, DRAWN_SEED = 8, 48, 77
SEEN_BEFORE = 8
"""Rollouts that the guesser has seen."""
COLUMNS = ("model", "ms without", "ms with", "times faster", "steps without", "with", "times fewer", "tokens a step")


class Side:
    """An engine, the time of each of its rollouts, and their decode steps."""

    def __init__(self, model: Any, tokenizer: Any, speculate: int) -> None:
        self.engine = SamplerEngine(model, tokenizer, options=SamplerOptions(speculate=speculate))
        self.engine.sync()
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self.gained: list[float] = []
        self._decode = self.engine.decoder.decode
        self.engine.decoder.decode = self._counted  # type: ignore[method-assign]

    def _counted(self, *inputs: Any) -> torch.Tensor:
        self.steps[-1] += 1
        return self._decode(*inputs)

    def draw(self, prompts: list[Prompt], step: int) -> dict[int, Rollout]:
        self.steps.append(0)
        params = SamplingParams(MAX_NEW_TOKENS, temperature=1.0)
        start = time.process_time()
        found = {rollout.prompt.row_id: rollout for rollout in self.engine.generate(prompts, GROUP, params, step)}
        self.seconds.append(time.process_time() - start)
        self.gained.append(self.engine.accepted_per_step or 1.0)
        return found


def gap(ours: dict[int, Rollout], theirs: dict[int, Rollout]) -> float:
    """Largest difference of log-probs; infinite where a token differs."""
    pairs = [pair for row, (_, those) in theirs.items() for pair in zip(ours[row].completions, those, strict=True)]
    if any(not torch.equal(a.token_ids, b.token_ids) for a, b in pairs):
        return float("inf")
    return max((a.logprobs - b.logprobs).abs().max().item() for a, b in pairs)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Any, Any, list[Prompt]]]:
    """Names, models, tokenizers and prompts."""
    count = options.prompts * (SEEN_BEFORE + options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sat.parquet"
        write_sat_parquet(file, count, DRAWN_SEED, kinds=DEMO_KINDS)
        rows = load_rows(str(file))
        for path in options.models:
            processing = load_processing(path)
            builder = PromptBuilder(processing.tokenizer, processing.image_processor, family=processing.family)
            prompts = [builder.build(rows.convert(*rows[i])) for i in range(len(rows))]
            yield Path(path).name, load_merged(path).to(options.device).eval(), processing.tokenizer, prompts
    random = Workload("3M", prompts=count, pictures=0)
    yield "random words", build_model(random.model, options.device), NoTexts(), build_prompts(random)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="+", default=[str(BASE_MODEL_PATH)], help="the demo's, early to late")
    arguments.add_argument("--speculate", type=int, default=3)
    arguments.add_argument("--prompts", type=int, default=8, help="of a rollout")
    arguments.add_argument("--rounds", type=int, default=30)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    result, table = Result("bench_speculate", options.device), []
    for name, model, tokenizer, prompts in cases(options):
        plain, guessing = (Side(model, tokenizer, k) for k in (0, options.speculate))
        gaps = []
        for step in range(SEEN_BEFORE + options.rounds):
            some = prompts[step * options.prompts :][: options.prompts]
            gaps.append(gap(*(side.draw(some, step) for side in (guessing, plain))))
        seconds, steps = (
            [getattr(side, kind)[SEEN_BEFORE:] for side in (plain, guessing)] for kind in ("seconds", "steps")
        )
        faster = median(a / b for a, b in zip(*seconds, strict=True))
        fewer = sum(steps[0]) / sum(steps[1])
        result.checks[f"{name}: same tokens, log-probs within 1e-4"] = max(gaps) < 1e-4
        result.ratios |= {f"rollout_time, {name}": faster, f"decode_steps, {name}": fewer}
        gained = sum(guessing.gained[SEEN_BEFORE:]) / options.rounds
        result.figures[name] = {"tokens_per_row_step": gained, "largest_logprob_gap": max(gaps)}
        ms = [1e3 * median(side) for side in seconds]
        table.append([name, *ms, faster, *(sum(side) / options.rounds for side in steps), fewer, gained])
    title = f"Rollouts of {options.prompts} × {GROUP}, up to {options.speculate} guesses"
    print_table(title, COLUMNS, table)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
