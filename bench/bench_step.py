"""Whole training steps of a tiny Qwen2-VL against another implementation, both in turn.

usage: python bench/bench_step.py [--against plain|paper|trl] [--device cpu]

A step: 4 prompts of a 336-px picture (144 image tokens) and some 70 tokens of text, 8 completions each of exactly 64
tokens (the end token lies outside the vocabulary), beta 0.04, float32, sdpa, no checkpointing, one micro-batch. Before
it, both sides' prompts, loss and gradients are compared; after it, what they learn: 3 seeds of 30 smaller steps (84-px
pictures, 24 tokens, 2 prompts), whose paired reward difference must be 0 within its 95 % interval, of half-width ≤ 0.1.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import Result, parser
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from fastgrpo.demo.base_model import build_config, load_tokenizer, save_model
from fastgrpo.demo.documents import DEMO_KINDS
from fastgrpo.demo.scenes import write_sat_parquet
from fastgrpo.profile import gate
from fastgrpo.profile.opponents import OPPONENTS, OURS, TRL
from fastgrpo.profile.run import QUIET, ProfileOptions, run_profile
from fastgrpo.profile.sides.start import start_side

PROMPTS, GROUP, TOKENS, PICTURE = 4, 8, 64, 336
GATE_PROMPTS, GATE_TOKENS, GATE_PICTURE = 2, 24, 84
HALF_WIDTH = 0.1
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a 95 % interval, by number of seeds."""
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
VISION = {"depth": 3, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 3}
SETTINGS = {
    "prompt_mode": "base",
    "batch_unit": "prompts",
    "per_device_train_batch_size": PROMPTS,
    "num_generations": GROUP,
    "max_completion_length": TOKENS,
    "loss_type": "grpo",
    "beta": 0.04,
    "learning_rate": 3.0e-4,
    "lr_scheduler_type": "constant",
    "reward_funcs": ["smooth_reward:vowels"],
    "attn_implementation": "sdpa",
    "min_pixels": PICTURE**2,
    "max_pixels": PICTURE**2,
    "log_completions": False,
    "gradient_checkpointing": False,
    "bf16": False,
}


def save_endless_model(
    folder: Path,
    text: Mapping[str, Any] = TEXT,
    vision: Mapping[str, Any] = VISION,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> int:
    """A model with random weights, whose end token it cannot draw; returns its number of parameters."""
    tokenizer = load_tokenizer()
    if "vocab_size" in text:
        tokenizer = with_vocabulary(tokenizer, text["vocab_size"])
    config = build_config(tokenizer, **text)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config).to(dtype)
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    tokenizer.pad_token = "<|endoftext|>"
    assert tokenizer.eos_token_id >= config.text_config.vocab_size, "the end token must lie outside the vocabulary"
    save_model(folder, model, tokenizer)
    return sum(parameter.numel() for parameter in model.parameters())


def with_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with words that no text contains, up to `size` in all: a model may draw any of them."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    state["model"]["vocab"] |= added | {f"<|{i}|>": i for i in range(len(tokenizer), size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )


def peak_above_start(against: str, settings: Sequence[str], folder: Path, trl_python: Path) -> dict[str, int]:
    """Most bytes each side holds within two steps beyond those it held when its model was loaded.

    In fresh processes that give freed memory back at once, so that peaks repeat; that makes them slow, so nothing is
    timed.
    """
    found = {}
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in (OURS, against):
        with ExitStack() as stack:
            side = start_side(
                name, [*settings, "--max_steps", "3"], folder, trl_python=trl_python, environment=returning
            )
            stack.callback(side.close)
            held = side.ready()["held_bytes"]
            found[name] = max(side.step(False).peak_bytes for _ in range(2)) - held
    return found


def reward_differences(
    against: str, settings: Sequence[str], folder: Path, trl_python: Path, *, seeds: int, steps: int
) -> list[float]:
    """Per seed, the mean over its steps of our reward less theirs."""
    smaller = {
        "per_device_train_batch_size": GATE_PROMPTS,
        "max_completion_length": GATE_TOKENS,
        "min_pixels": GATE_PICTURE**2,
        "max_pixels": GATE_PICTURE**2,
        "max_steps": steps + 1,
    }
    changes = [token for name, value in smaller.items() for token in (f"--{name}", str(value))]
    differences = []
    for seed in range(seeds):
        flags = [*settings, *changes, "--seed", str(seed)]
        with ExitStack() as stack:
            pair = []
            for name in (OURS, against):
                pair.append(start_side(name, flags, folder / f"seed-{seed}", trl_python=trl_python))
                stack.callback(pair[-1].close)
            for side in pair:
                side.ready()
            rewards = [[side.step(False).reward for side in pair] for _ in range(steps)]
        differences.append(statistics.fmean(ours - theirs for ours, theirs in rewards))
        (first, _), (last, _) = rewards[0], rewards[-1]
        print(f"seed {seed}: our reward {first:.3f} → {last:.3f}, difference {differences[-1]:+.4f}", flush=True)
    return differences


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of independent values."""
    return statistics.fmean(values), T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--against", choices=tuple(OPPONENTS), default=TRL)
    arguments.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    arguments.add_argument("--seeds", type=int, choices=tuple(T95), default=3)
    arguments.add_argument("--gate_steps", type=int, default=30, help="steps of each seed")
    arguments.add_argument("--folder", type=Path, help="keeps the page and the trace here")
    arguments.add_argument("--trl_python", type=Path, default=Path(".venv-bench/bin/python"))
    options = arguments.parse_args()
    result = Result("bench_step", options.device)
    # Both sides read the reward from here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]])
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        (folder / "model").mkdir(parents=True, exist_ok=True)
        parameters = save_endless_model(folder / "model")
        rows = max(PROMPTS * (options.steps + 3), GATE_PROMPTS * (options.gate_steps + 1))
        write_sat_parquet(folder / "sat.parquet", rows, 0, kinds=DEMO_KINDS)
        places = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "sat.parquet")}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({**SETTINGS, **places, "use_cpu": options.device == "cpu"}))
        profile = ProfileOptions(config, options.against, options.steps, 1, folder / "profile", options.trl_python)
        try:
            report = run_profile(profile)
        except gate.GateError as error:
            print(error, file=sys.stderr)
            result.checks["same_step"] = False
            return result.finish(options.out)
        quiet = [token for name, value in QUIET.items() for token in (f"--{name}", value)]
        settings = ["--config", str(config), *quiet]
        memory = peak_above_start(options.against, settings, folder / "memory", options.trl_python)
        differences = reward_differences(
            options.against, settings, folder, options.trl_python, seeds=options.seeds, steps=options.gate_steps
        )
    mean, half_width = interval(differences)
    ours, theirs = report.sides[report.ours], report.sides[report.theirs]
    result.checks |= {
        "same_step": True,
        **{f"apart: {name}": figure for name, figure in report.gate.items()},
        "exactly_64_tokens": ours.tokens == theirs.tokens == PROMPTS * GROUP * TOKENS,
        "reward_difference_holds_0": abs(mean) <= half_width,
        "reward_half_width_at_most_0.1": half_width <= HALF_WIDTH,
        "reward_difference": mean,
        "reward_half_width": half_width,
    }
    result.ratios |= {
        f"step_time_vs_{options.against}": report.speedup.median,
        f"tokens_per_s_vs_{options.against}": ours.tokens_per_s.median / theirs.tokens_per_s.median,
        f"peak_memory_vs_{options.against}": memory[options.against] / memory[OURS],
    }
    result.figures |= {"peak_bytes_above_start": memory}
    result.figures |= {"parameters": parameters, "speedup": asdict(report.speedup), "unattributed": ours.unattributed}
    result.figures |= {name: asdict(side) for name, side in report.sides.items()}
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
