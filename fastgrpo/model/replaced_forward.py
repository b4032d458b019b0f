"""Replaces one module's `forward`, or its class, within a context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context, a call of `module` runs `forward`.

    It is set on the instance, so `__call__` and with it every hook stays (ZeRO-3 gathers weights in one).
    """
    had_own, own = "forward" in vars(module), module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = own
        else:
            del module.forward


@contextmanager
def replaced_class(module: Any, kind: type) -> Iterator[None]:
    """Within this context, `module` has class `kind`, a subclass of its own that only overrides methods.

    Needed where the class's `forward` is wrapped, as transformers does to checkpoint layers.
    """
    own = module.__class__
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = own
