"""The update's forward and backward pass: packed groups that share their prompts, against the naive padded batch.

Naive has TRL's shape: each completion in a row of its own behind its whole prompt, padded to the longest, the vision
tower once per row, log-probs of the completion alone. It is `PlainUpdater`; ours is `PackedUpdater`; timed is the
whole of `accumulate`: loss, metrics and gradients. Same dtype, threads and model; no checkpointing on either side.

On CPU the model is a Qwen2-VL of 3.6 M parameters in float32, on CUDA one of Qwen2-VL-2B's shape in bfloat16.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from fastgrpo_kernels import LossParams
from harness import Result, parser, print_table
from timing import in_fresh_process, paired_ratio, paired_seconds, peak_bytes, spread
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo.plain.updater import PlainUpdater
from fastgrpo.types import Completion, Prompt, TrainingGroup, Updater
from fastgrpo.update.updater import PackedUpdater

RAGGED = (1, 5, 9, 17, 26, 38, 51, 64)
"""Completion lengths of the ragged workload."""
TEXT_TOKENS = 70
GRID = (24, 24)
"""Patches of a 336 × 336 picture: 144 image tokens, so a prompt has 214 tokens."""
IMAGE = 3


class Tolerance(NamedTuple):
    """How far the sides may be apart, relatively."""

    loss: float
    gradient: float


TOLERANCES = {"cpu": Tolerance(1e-5, 1e-5), "cuda": Tolerance(3e-2, 1e-1)}
"""float32; bfloat16, where the sides round in different places."""


@dataclass(frozen=True)
class Workload:
    """One optimizer step's groups: `prompts` of them, with completions of these lengths each."""

    lengths: tuple[int, ...]
    prompts: int = 1
    text_tokens: int = TEXT_TOKENS


FULL = Workload((64,) * 8)
CPU_WORKLOADS = {
    "full": FULL,
    "ragged": Workload(RAGGED),
    "C=16": Workload((16,) * 8),
    "C=256": Workload((256,) * 8),
    "P=162": replace(FULL, text_tokens=18),
    "P=400": replace(FULL, text_tokens=256),
    "G=2": Workload((64,) * 2),
    "G=4": Workload((64,) * 4),
    "G=16": Workload((64,) * 16),
    "4 prompts": replace(FULL, prompts=4),
}
CUDA_WORKLOADS = {
    "full": Workload((700,) * 8, prompts=8),
    "ragged": Workload((60, 120, 190, 260, 340, 430, 560, 700), prompts=8),
}


def build_model(device: str) -> Any:
    """Random weights."""
    if device == "cuda":  # Qwen2-VL-2B's own numbers
        sizes = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        heads, rope_sections, vision = (12, 2), [16, 24, 24], {"depth": 32, "embed_dim": 1280, "num_heads": 16}
    else:
        sizes = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
        heads, rope_sections, vision = (6, 2), [4, 6, 6], {"depth": 4, "embed_dim": 128, "num_heads": 4}
    text = {
        **sizes,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": rope_sections},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**vision, "hidden_size": sizes["hidden_size"], "mlp_ratio": 4, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=4, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).train()


def build_groups(workload: Workload, vocabulary: int) -> list[TrainingGroup]:
    """Random tokens, pictures and advantages; every token counts."""
    return [_group(workload, row, vocabulary) for row in range(workload.prompts)]


def _group(workload: Workload, row: int, vocabulary: int) -> TrainingGroup:
    draw = torch.Generator().manual_seed(row)
    height, width = (side // 2 for side in GRID)
    words = torch.randint(10, vocabulary, (workload.text_tokens,), generator=draw)
    place = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).T
    text = torch.arange(workload.text_tokens).expand(3, -1) + max(height, width)
    prompt = Prompt(
        row,
        torch.cat([torch.full((height * width,), IMAGE), words]),
        torch.cat([place, text], dim=1),
        torch.randn(GRID[0] * GRID[1], 3 * 2 * 14 * 14, generator=draw),
        torch.tensor([[1, *GRID]]),
        "",
    )
    lengths, total = workload.lengths, workload.prompts * sum(workload.lengths)
    guess = [torch.full((n,), -8.0) for n in lengths]
    ids = [torch.randint(10, vocabulary, (n,), generator=draw) for n in lengths]
    return TrainingGroup(
        prompt,
        tuple(Completion(row, i, ids[i], "", "stop", guess[i], guess[i]) for i in range(len(lengths))),
        torch.randn(len(lengths), generator=draw),
        tuple(torch.full((n,), 1 / total) for n in lengths),
        tuple(torch.ones(n, dtype=torch.bool) for n in lengths),
    )


def updaters(model: Any, device: str) -> dict[str, Updater]:
    """The two sides. A micro-batch of the naive one is a group."""
    params = LossParams(epsilon_high=0.28)
    budget = 16_384 if device == "cuda" else 4096
    return {
        "naive": PlainUpdater(model, params, micro_batch_size=8),
        "packed": PackedUpdater(model, params, token_budget=budget),
    }


def gradients_of(model: Any, updater: Updater, groups: list[TrainingGroup]) -> tuple[float, dict[str, Tensor]]:
    """Loss and every parameter's gradient, float32."""
    model.zero_grad()
    loss = updater.accumulate(groups).loss.item()
    return loss, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def max_relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest ‖Δg‖ / ‖g‖ of any parameter, ‖g‖ taken as at least 1e-3 of the largest one's."""
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(gradient.norm().item() for gradient in theirs.values())
    return max((ours[n] - g).norm().item() / max(g.norm().item(), least) for n, g in theirs.items())


def step(model: Any, updater: Updater, groups: list[TrainingGroup], *, keep_gradients: bool = False) -> None:
    """One update; `keep_gradients` zeroes them where they lie rather than freeing them."""
    model.zero_grad(set_to_none=not keep_gradients)
    updater.accumulate(groups)


def measure(name: str, model: Any, device: str, result: Result, *, rounds: int, peaks: bool = True) -> list[Any] | None:
    """Checks both sides' loss and gradients on one workload, then times them; a row of the table.

    None where they differ: then nothing is timed.
    """
    workload, sides, limits = workloads(device)[name], updaters(model, device), TOLERANCES[device]
    groups = build_groups(workload, model.config.get_text_config().vocab_size)
    their_loss, theirs = gradients_of(model, sides["naive"], groups)
    our_loss, ours = gradients_of(model, sides["packed"], groups)
    error = max_relative_error(ours, theirs)
    del ours, theirs
    same_loss = abs(our_loss - their_loss) <= limits.loss * (0.1 + abs(their_loss))
    result.figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result.checks |= {f"loss_{name}": same_loss, f"gradients_{name}": error <= limits.gradient}
    result.checks["max_grad_rel_err"] = max(error, result.checks.get("max_grad_rel_err", 0.0))
    if not (same_loss and error <= limits.gradient):
        print(f"Not timed: {name}: losses {our_loss:.6g} and {their_loss:.6g}, gradients {error:.2g} apart")
        return None
    calls = {side: partial(step, model, updater, groups) for side, updater in sides.items()}
    times = paired_seconds(calls, rounds=rounds, device=device)
    ratio = paired_ratio(times["naive"], times["packed"])
    result.ratios[f"time_vs_naive_{name}"] = ratio
    medians = {side: sorted(found)[len(found) // 2] for side, found in times.items()}
    result.figures[name] = {
        "lengths": workload.lengths,
        "prompts": workload.prompts,
        "prompt_tokens": workload.text_tokens + GRID[0] * GRID[1] // 4,
        **{f"{side}_seconds": median for side, median in medians.items()},
        **{f"{side}_spread": spread(found) for side, found in times.items()},
    }
    row = [name, medians["naive"], medians["packed"], ratio]
    if peaks:
        found = {side: in_fresh_process("--device", device, "--peak", name, side)["peak"] for side in sides}
        result.ratios[f"memory_vs_naive_{name}"] = found["naive"] / max(found["packed"], 1)
        result.figures[name] |= {f"{side}_peak_bytes": peak for side, peak in found.items()}
        row += [found["naive"] / 2**20, found["packed"] / 2**20]
    return row


def report_peak(device: str, workload: str, side: str) -> None:
    """In a process of its own: peak bytes of one side's step beyond weights, gradients and inputs."""
    model = build_model(device)
    groups = build_groups(workloads(device)[workload], model.config.get_text_config().vocab_size)
    updater = updaters(model, device)[side]
    tiny = [_group(Workload((2, 2)), 99, 100)]
    step(model, updater, tiny)  # from here on gradients are there, libraries loaded
    print(json.dumps({"peak": peak_bytes(lambda: step(model, updater, groups, keep_gradients=True), device)}))


def workloads(device: str) -> dict[str, Workload]:
    return CUDA_WORKLOADS if device == "cuda" else CPU_WORKLOADS


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7, help="paired timings of each workload")
    arguments.add_argument("--only", nargs="*", help="workloads to run; all by default")
    arguments.add_argument("--peak", nargs=2, metavar=("WORKLOAD", "SIDE"), help="measure one side's memory, alone")
    options = arguments.parse_args()
    if options.peak:
        report_peak(options.device, *options.peak)
        return 0

    model = build_model(options.device)
    result = Result("bench_update", options.device)
    names = options.only or workloads(options.device)
    measured = (measure(name, model, options.device, result, rounds=options.rounds) for name in names)
    rows = [row for row in measured if row]
    parameters = result.figures["parameters"]
    print_table(
        f"Update, forward + backward, {parameters / 1e6:.1f} M parameters",
        ["workload", "naive s", "packed s", "times faster", "naive MiB", "packed MiB"],
        rows,
    )
    return result.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
