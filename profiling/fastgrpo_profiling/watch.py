"""Spans around calls in other projects' code: a module's forward pass, an optimizer's step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastgrpo_profiling.span import span

Naming = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], str | None]
"""A forward call's module, arguments and keywords → the span's name, or None for no span."""


@contextmanager
def watch_forward(module: nn.Module, name: str | Naming) -> Iterator[None]:
    """Makes every forward call of `module` in this block a span, even one that raises."""
    opened: list[AbstractContextManager[None] | None] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = name if isinstance(name, str) else name(module, args, kwargs)
        opened.append(None if chosen is None else span(chosen))
        if opened[-1] is not None:
            opened[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if (last := opened.pop()) is not None:
            last.__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_optimizer(optimizer: Optimizer, name: str) -> None:
    """Makes every step of `optimizer` a span from now on. If one raises, its span stays open: torch calls no hook."""
    opened: list[AbstractContextManager[None]] = []

    def before(*_: Any) -> None:
        opened.append(span(name))
        opened[-1].__enter__()

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
