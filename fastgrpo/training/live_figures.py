"""How well each step of a run uses the machine: model FLOPs against a measured ceiling, and where its time went."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastgrpo_profiling import SpanTotal
from fastgrpo_profiling.phases import part_shares
from fastgrpo_profiling.roofline import NOTHING, ModelShape, StepWork, Update, measure_flops, step_flops
from torch import nn

from fastgrpo.settings.run_config import RunConfig
from fastgrpo.types import Prompt, ScoredRollout, TrainingGroup
from fastgrpo.update.packing import contributes


class LiveFigures:
    """MFU and time shares of a training run's steps, on this rank.

    MFU is the model FLOPs of what the step drew and trained on (`fastgrpo_profiling.roofline`) ÷ (its seconds × the
    rate of a large matrix product in the run's dtype, measured here once, before the first step).
    """

    def __init__(self, model: nn.Module, config: RunConfig, device: str) -> None:
        """
        Args:
            model: the policy; where its family's sizes are not known there is no MFU.
            device: "cpu" or "cuda", where it trains.
        """
        self.shape = ModelShape.known(getattr(model, "config", None))
        self.update = update_of(model, config)
        self.device, self.dtype = device, compute_dtype(model, config)
        self.ceiling: float | None = None
        """FLOP/s; None until measured."""
        self._drawn, self._trained = NOTHING, NOTHING

    def measure_ceiling(self) -> None:
        """Measures what the machine can do, once; some 0.1 s."""
        if self.ceiling is None and self.shape is not None:
            self.ceiling = measure_flops(self.device, self.dtype, repeats=3)

    def drew(self, groups: Sequence[ScoredRollout]) -> None:
        """The step under way drew this rollout."""
        self._drawn += work_of(groups)

    def trains_on(self, work: StepWork) -> None:
        """The step under way updates the policy with so much."""
        self._trained = work

    def of_step(self, totals: Mapping[str, SpanTotal], seconds: float) -> dict[str, float]:
        """The figures of the step that ends: `mfu`, `share/<part>`, and seconds as `time/<span>`."""
        figures = {f"time/{name}": total.seconds for name, total in totals.items()}
        own = {name: total.self_seconds for name, total in totals.items()}
        figures |= {f"share/{part}": share for part, share in part_shares(own, seconds).items()}
        if self.shape is not None and self.ceiling is not None:
            flops = step_flops(self.shape, self._drawn, self.update, self._trained)
            figures["mfu"] = sum(flops.values()) / (seconds * self.ceiling)
        self._drawn, self._trained = NOTHING, NOTHING
        return figures


def work_of(groups: Sequence[ScoredRollout]) -> StepWork:
    """What a rollout's lengths ask of a step."""
    return StepWork(
        prompts=[len(group.prompt.input_ids) for group in groups],
        pictures=[patches for group in groups for patches in patches_of(group.prompt)],
        completions=[[len(completion.token_ids) for completion in group.completions] for group in groups],
    )


def trained_part(groups: Sequence[TrainingGroup], beta: float) -> StepWork:
    """What an update must be computed for: completions that can have a gradient (`packing.contributes`)."""
    kept = [[i for i in range(len(group.completions)) if contributes(group, i, beta)] for group in groups]
    chosen = [(group, indices) for group, indices in zip(groups, kept, strict=True) if indices]
    return StepWork(
        prompts=[len(group.prompt.input_ids) for group, _ in chosen],
        pictures=[patches for group, _ in chosen for patches in patches_of(group.prompt)],
        completions=[[len(group.completions[i].token_ids) for i in indices] for group, indices in chosen],
    )


def patches_of(prompt: Prompt) -> list[int]:
    """Patches of each of a prompt's pictures."""
    grid = prompt.image_grid_thw
    return [] if grid is None else [int(picture.prod()) for picture in grid]


def update_of(model: nn.Module, config: RunConfig) -> Update:
    """The passes of a run's updates, from what its objective asks for and what trains in `model`."""
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = [name for name in training if "lora_" not in name]
    in_tower = [name for name in training if "visual." in name and "merger" not in name]
    return Update(
        reference_pass=config.needs_reference,
        old_logprobs_pass=not config.batch_plan.is_on_policy or config.needs_entropies,
        text_trains=any("visual." not in name for name in trained),
        vision_trains=any("lora_" not in name for name in in_tower),
        vision_adapts=any("lora_" in name for name in in_tower),
    )


def compute_dtype(model: nn.Module, config: RunConfig) -> torch.dtype:
    """What a run's matrix products are computed in."""
    if config.bf16 or config.fp16:
        return torch.bfloat16 if config.bf16 else torch.float16
    parameter: Any = next(model.parameters())
    return parameter.dtype
