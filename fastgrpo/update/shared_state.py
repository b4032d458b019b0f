"""Linear attention over packed groups: a prompt goes through once, and its state starts every completion."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgrpo.model.linear_attention import State, StateCache, linear_layers, run_prompts
from fastgrpo.model.replaced_forward import replaced_forward
from fastgrpo.update.shared_prefix import SharedPrefix


@contextmanager
def shared_state_layers(*models: Any) -> Iterator[None]:
    """Within this context, linear attention of these models takes packed groups. Enclose forward *and* backward."""
    modules = [module for model in dict.fromkeys(models) for module in linear_layers(model).values()]
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.enter_context(replaced_forward(module, partial(_forward, module.forward)))
        yield


def _forward(own: Any, hidden_states: Tensor, *, shared_prefix: SharedPrefix, **_: Any) -> Tensor:
    """[1, T, H] → [1, T, H]. Completions run as one right-padded batch, which is exact: the rule is causal."""
    layout = shared_prefix.layout
    prompt = layout.prompt_tokens
    seen, states = run_prompts(own, hidden_states[:, :prompt], layout.prompts.q_lengths)
    lengths, counts = list(layout.completions.q_lengths), iter(layout.completions.tiles)
    owners = [p for p, asked in enumerate(layout.across.q_lengths) if asked for _ in range(next(counts))]
    parts = hidden_states[0, prompt:].split(lengths)
    if not lengths:  # ranks under ZeRO-3 must call a module equally often, so an unused token stands in
        owners, parts = [0], hidden_states[0, :1].split(1)
    start = State(*(part[owners] for part in states))
    found = own(pad_sequence(parts, batch_first=True), cache_params=StateCache(start))  # [S, longest, H]
    if not lengths:
        return seen + 0.0 * found[:, :1]
    return torch.cat([seen[0], *(row[:n] for row, n in zip(found, lengths, strict=True))])[None]
