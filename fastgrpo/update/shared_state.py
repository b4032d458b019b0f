"""Linear attention over packed groups: a prompt goes through once, and its state starts every completion."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgrpo.model.linear_attention import State, finish, linear_layers, project, run_sequences
from fastgrpo.model.replaced_forward import replaced_forward
from fastgrpo.update.shared_prefix import SharedPrefix


@contextmanager
def shared_state_layers(*models: Any) -> Iterator[None]:
    """Within this context, linear attention of these models takes packed groups. Enclose forward *and* backward."""
    modules = [module for model in dict.fromkeys(models) for module in linear_layers(model).values()]
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.enter_context(replaced_forward(module, partial(_forward, module)))
        yield


def _forward(module: Any, hidden_states: Tensor, *, shared_prefix: SharedPrefix, **_: Any) -> Tensor:
    """[1, T, H] → [1, T, H]."""
    layout = shared_prefix.layout
    prompt, tokens = layout.prompt_tokens, project(module, hidden_states[0])
    out, states = run_sequences(module, tokens.part(0, prompt), layout.prompts.q_lengths)
    if lengths := layout.completions.q_lengths:
        counts = iter(layout.completions.tiles)
        owners = [p for p, asked in enumerate(layout.across.q_lengths) if asked for _ in range(next(counts))]
        start = State(*(part[owners] for part in states))
        out = torch.cat([out, run_sequences(module, tokens.part(prompt, len(tokens.mixed)), lengths, start)[0]])
    return finish(module, out, tokens.gate)[None]
