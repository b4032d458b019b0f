"""Freezes the vision tower or the language model."""

from torch import nn
from transformers import PreTrainedModel

from fastgrpo.model.families import PROJECTORS, VISION_TOWERS


def freeze(model: PreTrainedModel, freeze_vision: bool, freeze_llm: bool) -> None:
    """Freezes the tower, or the language model with its head. What maps one into the other always trains.

    Raises:
        ValueError: a model without a vision tower.
    """
    if not freeze_vision and not freeze_llm:
        return
    tower, merger = _vision_parameters(model)
    if not tower:
        flag = "freeze_vision" if freeze_vision else "freeze_llm"
        raise ValueError(f"{flag}=True, but {type(model).__name__} has no vision tower: leave the flag off")
    kept = {id(parameter) for parameter in (*tower, *merger)}
    language = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    for parameter in [*(tower if freeze_vision else []), *(language if freeze_llm else [])]:
        parameter.requires_grad_(False)


def _vision_parameters(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the vision tower without its merger, and those of the merger or projector."""
    tower, merger = [], []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if any(name in part for part in parts for name in PROJECTORS):
            merger.append(parameter)
        elif any(part in VISION_TOWERS for part in parts):
            tower.append(parameter)
    return tower, merger
