"""Records what TRL's own loss gives on fixed log-probs: the fixture of tests/kernels/test_trl_parity.py.

    make install-bench
    .venv-bench/bin/python bench/record_trl_losses.py

`GRPOTrainer._compute_loss` runs unchanged; only the model's forward is replaced, by tensors. Running it again gives the
same file. Combinations are drawn at random, the same number for each loss type and level, such that every two values
of different options meet.
"""

import fastgrpo.profile.sides.trl_on_cpu  # noqa: F401  isort: skip

import argparse
import itertools
import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from trl import GRPOTrainer
from trl import __version__ as trl_version

OUT = Path(__file__).parents[1] / "tests" / "kernels" / "data" / "trl_losses.safetensors"
LENGTHS = [9, 4, 12, 1, 7, 0]
"""Counted tokens of each completion, before `HOLE`; the last is fully masked."""
LENGTH = 12
HOLE = (2, slice(3, 6))
"""Tokens that a tool wrote: masked out in the middle of a completion."""
DRAWS = 10
"""Combinations for each loss type and level."""
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
LEVELS = ["token", "sequence"]
OPTIONS: dict[str, list[Any]] = {
    "beta": [0.0, 0.04, 0.5],
    "delta": [None, 1.15, 1.5],
    "epsilon": [0.2, 0.1],
    "epsilon_high": [0.2, 0.28],  # cispo's bound is epsilon_high itself: 1 is added for it
    "use_bias_correction_kl": [False, True],
    "top_entropy_quantile": [1.0, 0.5],
    "off_policy_mask_threshold": [None, 0.05],
    "importance_sampling_ratio": [None, "token", "sequence"],
    "entropy_coef": [0.0, 0.02],
    "sapo_temperature_pos": [1.0, 2.0],
    "sapo_temperature_neg": [1.05, 0.7],
    "vespo_k_pos": [2.0, 1.0],
    "vespo_lambda_pos": [3.0, 1.0],
    "vespo_k_neg": [3.0, 1.5],
    "vespo_lambda_neg": [2.0, 0.5],
    "has_old_logprobs": [True, True, False],
    "accumulation_steps": [1, 4],
    "steps_per_generation": [4, 8],
}
MAX_COMPLETION_LENGTH = 16
ITEMS_IN_BATCH = 301.0
"""Counted tokens of the generation batch."""


class LossOnly(GRPOTrainer):
    """TRL's loss and nothing else of its trainer."""

    def __init__(self, case: dict[str, Any], logprobs: Tensor, entropy: Tensor) -> None:
        self.logprobs, self.entropy = logprobs, entropy
        self.entropy_mask = self.off_policy_mask = torch.ones(())
        self.args = SimpleNamespace(**case)
        self.model = SimpleNamespace(training=True)
        self.accelerator = Accelerator(cpu=True)
        self.aux_loss_enabled = self.use_adaptive_entropy = False
        self.vllm_importance_sampling_correction = True
        self.use_vllm = case["importance_sampling_ratio"] is not None
        self.max_completion_length = MAX_COMPLETION_LENGTH
        self.epsilon_low = case["epsilon"]
        self.current_gradient_accumulation_steps = case["accumulation_steps"]
        self._entropy_bonus_enabled = case["entropy_coef"] != 0
        self._metrics = {"train": defaultdict(list)}
        for name in (
            "loss_type",
            "importance_sampling_level",
            "beta",
            "epsilon_high",
            "top_entropy_quantile",
            "off_policy_mask_threshold",
            "entropy_coef",
        ):
            setattr(self, name, case[name])

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        return self.logprobs, self.entropy, None

    def get_high_entropy_mask(self, *args: Any) -> Tensor:
        self.entropy_mask = super().get_high_entropy_mask(*args)
        return self.entropy_mask

    def get_off_policy_mask(self, **kwargs: Any) -> Tensor:
        self.off_policy_mask = GRPOTrainer.get_off_policy_mask(**kwargs)
        return self.off_policy_mask


def draw_inputs() -> dict[str, Tensor]:
    """Log-probs [B, L] of the policy, and of others some way off: token by token, and each completion as a whole."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (len(LENGTHS), LENGTH)
    logprobs = -noise(*shape).abs() - 0.2
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    mask[HOLE] = 0
    shift = torch.tensor([0.4, -0.3, -0.5, 0.3, 0.05, 0.2])[:, None]
    ratio = (0.3 * noise(*shape)).exp().clamp(max=1.5)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs - shift + 0.2 * noise(*shape),
        "ref_logprobs": logprobs + 0.5 * noise(*shape),
        "sampling_logprobs": logprobs - shift + 0.3 * noise(*shape),
        "entropy": noise(*shape).abs(),
        "advantages": torch.tensor([1.2, -0.7, -1.5, 0.4, 0.0, 0.9]),
        "mask": mask,
        "token_sampling_ratio": ratio.where(mask.bool(), 1.0),  # as where nothing was sampled
        "sequence_sampling_ratio": ratio[:, :1].contiguous(),
    }


def draw_cases() -> list[dict[str, Any]]:
    """Options under TRL's names, and what a trainer knows of its batch."""
    chance = random.Random(0)
    cases = []
    for loss_type, level in itertools.product(LOSS_TYPES, LEVELS):
        for _ in range(DRAWS):
            case = {"loss_type": loss_type, "importance_sampling_level": level}
            cases.append(case | {name: chance.choice(values) for name, values in OPTIONS.items()})
    values = {"loss_type": LOSS_TYPES, "importance_sampling_level": LEVELS, **OPTIONS}
    for one, other in itertools.combinations(values, 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(values[one], values[other])), f"{one} and {other}: raise DRAWS"
    for case in cases:
        if case["loss_type"] == "vespo" and case["importance_sampling_ratio"] == "sequence":
            case["importance_sampling_ratio"] = "token"  # the other is refused
        case["epsilon_high"] += case["loss_type"] == "cispo"
    return cases


def record(case: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """TRL's loss, its gradients [B, L], the masks it multiplied in, and its metrics."""
    logprobs, entropy = (inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
    trainer = LossOnly(case, logprobs, entropy)
    ones = torch.ones_like(inputs["mask"])
    batch = {
        "prompt_ids": ones[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ones,
        "completion_mask": ones,
        "tool_mask": inputs["mask"],
        "advantages": inputs["advantages"],
        "ref_per_token_logps": inputs["ref_logprobs"],
        "num_items_in_batch": torch.tensor(ITEMS_IN_BATCH),
    }
    if case["has_old_logprobs"]:
        batch["old_per_token_logps"] = inputs["old_logprobs"]
    scale = torch.ones_like(logprobs)
    if case["importance_sampling_ratio"] is not None:
        batch["sampling_per_token_logps"] = inputs["sampling_logprobs"]
        batch["importance_sampling_ratio"] = inputs[f"{case['importance_sampling_ratio']}_sampling_ratio"]
        if case["loss_type"] != "vespo":  # whose weights take it in
            scale = scale * batch["importance_sampling_ratio"]
    loss = trainer._compute_loss(None, batch)
    loss.backward()
    outputs = {
        "loss": loss.detach(),
        "logprobs_grad": logprobs.grad,
        "entropy_grad": torch.zeros_like(entropy) if entropy.grad is None else entropy.grad,
        "policy_scale": scale * trainer.off_policy_mask * trainer.entropy_mask,
        "bonus_mask": (inputs["mask"] * trainer.entropy_mask).bool(),
    }
    return outputs, {name: values[0] for name, values in sorted(trainer._metrics["train"].items())}


def main() -> None:
    """Records every case and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    inputs, cases = draw_inputs(), draw_cases()
    recorded, metrics = zip(*(record(case, inputs) for case in cases), strict=True)
    tensors = {name: torch.stack([outputs[name] for outputs in recorded]) for name in recorded[0]}
    # One entry: the order in which the format writes several is not fixed.
    description = {
        "trl": trl_version,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "items_in_batch": ITEMS_IN_BATCH,
        "cases": [{"options": case, "metrics": values} for case, values in zip(cases, metrics, strict=True)],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({**inputs, **tensors}, out, metadata={"recording": json.dumps(description)})
    print(f"{len(cases)} cases of TRL {trl_version}: {out}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
