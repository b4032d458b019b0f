"""What a model does to its head's logits z: scale · z (Granite, Cohere), or cap · tanh(z / cap) (Gemma 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.model.families import base_model

NEUTRAL = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Settings of text configs that change the logits → the value that changes nothing."""


@dataclass(frozen=True)
class LogitFormula:
    """softcap(scale · z)."""

    scale: float = 1.0
    softcap: float | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Applies the cap, in float32, to logits that are scaled already."""
        assert self.softcap is not None
        return self.softcap * torch.tanh(logits.float() / self.softcap)


def logit_formula(model: Any) -> LogitFormula:
    """The formula of a transformers model."""
    config = base_model(model).config.get_text_config()
    values = {name: getattr(config, name, None) for name in NEUTRAL}
    scale = (values["logit_scale"] or 1.0) / (values["logits_scaling"] or 1.0)
    return LogitFormula(scale, values["final_logit_softcapping"])


@contextmanager
def linear_logits(model: Any) -> Iterator[None]:
    """Within this context, the model hands on what its head says: the caller applies the formula."""
    policy = base_model(model)
    owners = [policy.config.get_text_config(), policy]
    found = [(owner, name, getattr(owner, name)) for owner in owners for name in NEUTRAL if hasattr(owner, name)]
    for owner, name, _ in found:
        setattr(owner, name, NEUTRAL[name])
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)
