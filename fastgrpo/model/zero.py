"""Access to parameters that ZeRO-3 has partitioned."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 has partitioned any of them."""
    return any(hasattr(p, "ds_id") for p in parameters)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within this context, partitioned parameters are whole on every rank."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed  # already imported by the code that partitioned them

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return context
