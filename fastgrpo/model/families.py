"""What is where in a transformers model, wrapped or not, of whatever family."""

from typing import Any


def unwrap(model: Any) -> Any:
    """The transformers (or peft) model inside DDP or DeepSpeed."""
    return getattr(model, "module", model)


def base_model(model: Any) -> Any:
    """The transformers model inside DDP, DeepSpeed or peft wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_model(model: Any) -> Any:
    """The module with `embed_tokens`, `layers` and `norm`."""
    inner = base_model(model).model
    return getattr(inner, "language_model", inner)


def is_multimodal(model: Any) -> bool:
    """Whether a model takes pictures."""
    return hasattr(base_model(model).config, "vision_config")
