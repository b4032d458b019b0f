"""Families without packed weights: rollouts against HF `generate` and the packed decoder, and a hybrid's update.

    python bench/bench_family_speed.py --out bench/results/families-cpu.json && python bench/tables.py

On one CPU thread, by the processor's time. Models have the sizes of `workloads.MODELS["4M"]`, prompts some 214 tokens,
groups 8 completions of 64 tokens; rollouts have four prompts. A hybrid has three layers of linear attention in four.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers
from bench_update import step, updaters
from family_parity import gradients, logprobs_of
from harness import Result, parser, print_table
from sides.rollout import build_engine, hf_rollout, our_rollout
from timing import paired_ratio, paired_seconds
from workloads import IMAGE, MODELS, SMALL, VIDEO, Workload, build_groups, build_model, build_prompts, rollouts_of

from fastgrpo.sampler import choice

SIZE = MODELS["4M"]
TEXT = SIZE.text | {"head_dim": SIZE.hidden // SIZE.heads, "bos_token_id": None, "eos_token_id": None}
LINEAR = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_key_heads": 12,
    "linear_num_value_heads": 12, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
PICTURES = rollouts_of("cpu")["64 tokens"]
WORDS = replace(PICTURES, text_tokens=(214, 208, 220, 214), pictures=0)
COLUMNS = ("what", "against", "theirs s", "ours s", "times faster")
MOST_ERROR, MOST_GRADIENT_ERROR = 1e-4, 1e-5


def wide_model(name: str) -> Any:
    """Llama, Gemma or Qwen3.5 of random weights, float32, without end token."""
    torch.manual_seed(0)
    if name == "Qwen3.5":
        rope = TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0}
        vision = {
            "depth": SIZE.vision_layers, "hidden_size": SIZE.vision_hidden, "num_heads": SIZE.vision_heads,
            "intermediate_size": SIZE.vision_mlp_ratio * SIZE.vision_hidden, "out_hidden_size": SIZE.hidden,
            "patch_size": 14,
        }  # fmt: skip
        config = transformers.Qwen3_5Config(
            text_config=TEXT | LINEAR | {"rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        kinds = [getattr(transformers, name + part) for part in ("Config", "ForCausalLM")]
        model = kinds[1](kinds[0](**TEXT | {"rope_parameters": rope}))
    model.generation_config.eos_token_id = None
    return model.eval()


def rollout_error(model: Any, engine: Any, workload: Workload) -> float:
    """The largest difference of a group's log-probs from transformers' own forward pass of each."""
    one = replace(workload, prompts=1)
    ((_, completions),) = our_rollout(engine, one, 16).items()
    exact = [logprobs_of(model, build_prompts(one)[0], completion.token_ids) for completion in completions]
    return max((c.logprobs - logprobs).abs().max().item() for c, logprobs in zip(completions, exact, strict=True))


def measure(result: Result, rounds: int) -> list[list[Any]]:
    """The table's rows; fills in checks and ratios."""
    rows: list[list[Any]] = []

    def compare(what: str, against: str, sides: dict[str, Any]) -> None:
        """Times two sides, theirs first."""
        theirs, ours = paired_seconds(sides, rounds=rounds, clock=time.process_time).values()
        result.ratios[f"{what}, against {against}"] = paired_ratio(theirs, ours)
        rows.append([what, against, median(theirs), median(ours), paired_ratio(theirs, ours)])

    for name, workload in (("Llama", WORDS), ("Gemma", WORDS), ("Qwen3.5", PICTURES)):
        model = wide_model(name)
        engine = build_engine(model)
        result.checks[f"{name}: log-probs"] = rollout_error(model, engine, workload) <= MOST_ERROR
        calls = {"hf": partial(hf_rollout, model, workload, 64), "ours": partial(our_rollout, engine, workload, 64)}
        compare(f"{name} rollout", "HF generate", calls)
    model = build_model("4M", "cpu")
    packed = build_engine(model)
    with patch.object(choice, "is_packed", return_value=False):
        generic = build_engine(model)
    result.checks["Qwen2-VL, generic: log-probs"] = rollout_error(model, generic, PICTURES) <= MOST_ERROR
    engines = {"packed": packed, "generic": generic}
    sides = {name: partial(our_rollout, engine, PICTURES, 64) for name, engine in engines.items()}
    compare("Qwen2-VL rollout, generic", "packed decoder", sides)
    model = wide_model("Qwen3.5").train()
    for name, workload in (("with a picture", SMALL), ("of words", replace(SMALL, text_tokens=(214,), pictures=0))):
        groups, both = build_groups(workload), updaters(model, "cpu")
        theirs, ours = (gradients(model, updater, groups) for updater in both.values())
        floor = 0.01 * max(gradient.norm().item() for gradient in theirs.values())
        off = max((ours[n] - g).norm().item() / max(g.norm().item(), floor) for n, g in theirs.items())
        result.checks[f"Qwen3.5 update {name}: gradients"] = off <= MOST_GRADIENT_ERROR
        calls = {side: partial(step, model, updater, groups) for side, updater in both.items()}
        compare(f"Qwen3.5 update, prompt {name}", "naive padded batch", calls)
    return rows


def main() -> int:
    arguments = parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5, help="paired timings of each comparison")
    arguments.set_defaults(device="cpu")
    options = arguments.parse_args()
    if options.device != "cpu":
        arguments.error("--device cuda: measured on a CPU alone; leave it out.")
    torch.set_num_threads(1)
    result = Result("bench_family_speed", "cpu")
    rows = measure(result, options.rounds)
    result.figures["comparisons"] = [
        dict(zip(("what", "against", "theirs_s", "ours_s", "ratio"), row, strict=True)) for row in rows
    ]
    print_table("Families without packed weights", COLUMNS, rows)
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
