"""Evaluation: `fastgrpo eval`'s way through the sampler against HF `generate`, on the demo's model and questions.

    python bench/bench_eval.py --device cpu

Both sides score the same held-out questions, greedily, from rows to figures, pictures included; HF answers them in
left-padded batches of as many questions as the sampler has rows. Loading the model is left out.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Result, parser, print_table
from timing import paired_ratio, paired_seconds, spread

from fastgrpo.data.loading import load_rows
from fastgrpo.data.prompts import PromptBuilder
from fastgrpo.demo.base_model import BASE_MODEL_PATH
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.run import HELD_OUT_SEED
from fastgrpo.demo.scenes import write_cvbench_parquet
from fastgrpo.evaluation import Evaluation, evaluate
from fastgrpo.model.load import load_merged, load_processing
from fastgrpo.plain.engine import PlainEngine
from fastgrpo.sampler.engine import SamplerEngine, SamplerOptions

ROWS_AT_ONCE = 64
"""Of `fastgrpo eval`."""
COLUMNS = ("side", "seconds", "spread", "questions/s", "accuracy", "tokens a response")


def said(evaluation: Evaluation) -> list[str]:
    return [record["completion"] for record in evaluation.records]


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default=str(BASE_MODEL_PATH), help="the demo's base, or what a demo run trained")
    arguments.add_argument("--questions", type=int, default=256)
    arguments.add_argument("--max_new_tokens", type=int, default=48, help="as in the demo")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads, of both sides")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model = load_merged(options.model).to(options.device)
    processing = load_processing(options.model)
    builder = PromptBuilder(processing.tokenizer, processing.image_processor, family=processing.family)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cvbench.parquet"
        write_cvbench_parquet(file, options.questions, HELD_OUT_SEED, kinds=DEMO_KINDS)
        rows = load_rows(str(file))
        engines: dict[str, Any] = {
            "hf": PlainEngine(model, processing.tokenizer, max_batch=ROWS_AT_ONCE),
            "ours": SamplerEngine(model, processing.tokenizer, options=SamplerOptions(max_rows=ROWS_AT_ONCE)),
        }
        engines["ours"].sync()
        found: dict[str, Evaluation] = {}

        def score(side: str) -> None:
            found[side] = evaluate(engines[side], builder, rows, max_new_tokens=options.max_new_tokens)

        result = Result("bench_eval", options.device)
        calls = {side: lambda side=side: score(side) for side in engines}
        times = paired_seconds(calls, rounds=options.rounds, device=options.device)
    same = sum(a == b for a, b in zip(said(found["hf"]), said(found["ours"]), strict=True))
    result.checks["same greedy answers"] = same == options.questions
    result.checks["same accuracy"] = found["hf"].total == found["ours"].total
    result.ratios["time_vs_hf"] = paired_ratio(times["hf"], times["ours"])
    result.figures |= {
        "questions": options.questions,
        "tokens_per_response": found["ours"].mean_length,
        "same_answers": same,
        "seconds": {side: median(seconds) for side, seconds in times.items()},
        "spread": {side: spread(seconds) for side, seconds in times.items()},
        "accuracy": found["ours"].total.accuracy,
    }
    table = []
    for side, seconds in times.items():
        speed, total = options.questions / median(seconds), found[side].total
        table.append([side, median(seconds), spread(seconds), speed, total.accuracy, found[side].mean_length])
    print_table("Evaluation", COLUMNS, table)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
