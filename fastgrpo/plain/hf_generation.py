"""What HF `generate` lacks for rollouts: exact log-probs of the drawn tokens, and no settings but ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, RepetitionPenaltyLogitsProcessor

from fastgrpo.model.families import base_model, unwrap

TRANSFORMERS_GENERATE = GenerationMixin.generate


def has_own_generate(model: Any) -> bool:
    """Whether a model draws by a `generate` of its own, not by transformers' or peft's."""
    replaced = any("generate" in vars(one) for one in (unwrap(model), base_model(model)))
    return replaced or getattr(type(base_model(model)), "generate", None) is not TRANSFORMERS_GENERATE


@contextmanager
def own_defaults_off(model: nn.Module) -> Iterator[None]:
    """Hides the model's own generation settings, from which HF would fill every field that ours leave unset."""
    holders = [m for m in model.modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)]
    own = [module.generation_config for module in holders]
    for module in holders:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in zip(holders, own, strict=True):
            module.generation_config = config


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """HF's repetition penalty, ignoring the padding before a prompt: the padding token often is the end token."""

    def __init__(self, penalty: float, prompt_mask: Tensor) -> None:
        super().__init__(float(penalty))
        self.is_padding = prompt_mask == 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = self.is_padding.shape[1]
        prompt = torch.where(self.is_padding, input_ids[:, width - 1 : width], input_ids[:, :width])
        return super().__call__(torch.cat([prompt, input_ids[:, width:]], dim=1), scores)


class LogprobRecorder(LogitsProcessor):
    """Records the log-prob of every drawn token under the scores it is given; keeps one [B, V] matrix at a time.

    A processor sees step t's scores before the token is drawn, so the token is looked up when step t + 1 calls.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.columns: list[Tensor] = []
        self.pending: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.pending is not None:
            self._look_up(self.pending, input_ids[:, -1])
        self.pending = scores.float() / self.temperature
        return scores

    def finish(self, tokens: Tensor) -> Tensor | None:
        """[B, C] float32 log-probs of `tokens` [B, C]; None if it was never called, by a model's own `generate`."""
        if self.pending is None:
            return None
        self._look_up(self.pending, tokens[:, -1])
        return torch.stack(self.columns, dim=1)

    def _look_up(self, scores: Tensor, tokens: Tensor) -> None:
        self.columns.append(torch.log_softmax(scores, dim=-1).gather(1, tokens[:, None]).squeeze(1))
