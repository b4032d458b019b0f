"""The operator around an implementation of `linear_logprob`: its schema, shapes and derivative, the same for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.backend import register_operator
from fastgrpo_kernels.checks import check_linear_values, computing_dtype


class LinearOptions(NamedTuple):
    """Arguments that are not tensors."""

    temperature: float
    entropy: bool
    ignore_index: int
    byte_budget: int
    keep: bool
    """Whether exponentials of all logits are kept for the backward pass."""


class RowStatistics(NamedTuple):
    """Statistics that the forward pass saves for the backward pass, per hidden row, in the computing dtype."""

    lse: Tensor
    """[T]: log Σ exp(logits / temperature); 0 for rows that no target reads."""
    entropy: Tensor
    """[T]; 0 unless asked."""


Kept = tuple[Tensor, Tensor]
"""Exponentials of the logits and the maxima they are relative to, in the implementation's layout. The backward pass
overwrites the exponentials."""
Gradients = tuple[Tensor | None, Tensor | None]
"""Of hidden and weight; None where not needed."""
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, LinearOptions], tuple[Tensor, Tensor, RowStatistics, Kept]]
"""(hidden, weight, targets, rows, options) → log-probs and entropies [N], statistics, what is kept."""
Backward = Callable[..., Gradients]
"""(gradients of log-probs and entropies [N], hidden, weight, targets, rows, statistics, what was kept or None, options,
whether hidden and weight need a gradient) → both."""
Room = Callable[[Tensor, Tensor, Tensor, LinearOptions], Kept]
"""(hidden, weight, targets, options) → what is kept, uninitialised."""

_INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor rows"
_OPTIONS = "float temperature, bool entropy, int ignore_index, int byte_budget, bool keep"


def nothing_kept(hidden: Tensor) -> Kept:
    """Placeholder if nothing is kept."""
    return hidden.new_empty(0), hidden.new_empty(0, dtype=torch.float32)


def register_linear_logprob(name: str, forward: Forward, backward: Backward, room: Room) -> Callable[..., Any]:
    """The operator `name` of (hidden, weight, targets, rows, *options) → log-probs and entropies [N], log-sum-exps and
    entropies [T], what is kept."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *values: Any) -> tuple[Tensor, ...]:
        options = LinearOptions(*values)
        check_linear_values(hidden, weight, targets, rows, options.ignore_index)
        logprobs, entropies, statistics, kept = forward(hidden, weight, targets, rows, options)
        return logprobs, entropies, *statistics, *kept

    def fake(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *values: Any) -> tuple[Tensor, ...]:
        options = LinearOptions(*values)
        by_target, by_row = (hidden.new_empty(len(x), dtype=computing_dtype(hidden)) for x in (targets, hidden))
        kept = room(hidden, weight, targets, options) if options.keep else nothing_kept(hidden)
        return by_target, torch.empty_like(by_target), by_row, torch.empty_like(by_row), *kept

    def run_backward(
        grad_logprobs: Tensor,
        grad_entropy: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor,
        lse: Tensor,
        row_entropy: Tensor,
        exponentials: Tensor,
        maximum: Tensor,
        *values: Any,
    ) -> tuple[Tensor, Tensor]:
        *chosen, need_hidden, need_weight = values
        options = LinearOptions(*chosen)
        kept = (exponentials, maximum) if options.keep else None
        statistics = RowStatistics(lse, row_entropy)
        upstream = (grad_logprobs, grad_entropy)
        needed = (need_hidden, need_weight)
        gradients = backward(*upstream, hidden, weight, targets, rows, statistics, kept, options, *needed)
        if kept is not None:  # a kernel's writes count no version
            torch.autograd.graph.increment_version(exponentials)
        dhidden, dweight = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
        return dhidden, dweight

    def fake_backward(_: Tensor, __: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = rest[-2:]
        return (
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0),
            torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else hidden.new_empty(0),
        )

    backward_operator = register_operator(
        f"{name}_backward(Tensor grad_logprobs, Tensor grad_entropy, {_INPUTS}, Tensor lse, Tensor row_entropy, "
        f"Tensor(a!) exponentials, Tensor maximum, {_OPTIONS}, bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
        run_backward,
        fake_backward,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, rows, *values = inputs
        ctx.options = LinearOptions(*values)
        ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the exponentials
        # The parameter itself, not a view or copy: under ZeRO-3 its storage is freed after the forward pass, and the
        # hook that gathers it again before the module's backward pass fills this same tensor.
        saved = output[2:] if ctx.options.keep else output[2:4]
        ctx.save_for_backward(hidden, weight, targets, rows, *saved)

    def differentiate(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors
        none = saved[4].new_zeros(len(saved[2]))  # [N]
        upstream = (none if grad is None else grad for grad in (grad_logprobs, grad_entropy))
        # The backward pass overwrites only what was kept; without it, a second backward pass works.
        kept = () if ctx.options.keep else nothing_kept(saved[0])
        gradients = backward_operator(*upstream, *saved, *kept, *ctx.options, *needs)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 7

    outputs = ", ".join(["Tensor"] * 6)
    schema = f"{name}({_INPUTS}, {_OPTIONS}) -> ({outputs})"
    return register_operator(schema, run, fake, save=save, backward=differentiate)
