"""The LM head's log-probs as we, plain torch and other libraries compute them."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastgrpo_kernels import linear_logprob
from torch import Tensor

from sides import Op, Results, Side, Work, dtype_name, tolerance_of

KEEP_BUDGET = 1 << 62
"""Bytes: the logits of all rows are kept for the backward pass."""
RECOMPUTE_BUDGET = 1 << 30
TRL_VOCABULARY_CHUNK = 32_768
"""What TRL passes."""
TRUTH_ROWS = 512


class HeadInputs(NamedTuple):
    """A micro-batch at the LM head: `len(advantages)` completions of equal length, one after the other."""

    hidden: Tensor
    """[T, H]"""
    weight: Tensor
    """[V, H]"""
    targets: Tensor
    """[T] int64"""
    advantages: Tensor
    """[S] float32, of T / S tokens each."""

    @property
    def grad_logprobs(self) -> Tensor:
        """[T] float32: the gradient of −Σ advantage · ratio / T, the on-policy loss, in the log-probs."""
        tokens = len(self.targets)
        return -self.advantages.repeat_interleave(tokens // len(self.advantages)) / tokens

    @property
    def by_sequence(self) -> tuple[Tensor, Tensor]:
        """Hidden states [S, T / S, H] and targets [S, T / S]."""
        shape = len(self.advantages), -1
        return self.hidden.view(*shape, self.hidden.shape[1]), self.targets.view(shape)


def head_op(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str) -> Op:
    """`linear_logprob`, both passes. Of its work, what is computed twice counts once: logits, dX and dW."""
    return Op(
        name="head",
        shape=f"T={tokens} H={hidden_size} V={vocabulary} {dtype_name(dtype)}",
        make_inputs=lambda: _inputs(tokens, hidden_size, vocabulary, dtype, device),
        sides=lambda: head_sides(device),
        exact=exact_head,
        tolerance=tolerance_of(dtype),
        work=Work(6.0 * tokens * hidden_size * vocabulary, "gemm"),
        is_small=False,
    )


def head_sides(device: str) -> list[Side]:
    """Ours, plain torch, then the peers."""
    keeping = [("fastgrpo", KEEP_BUDGET), ("fastgrpo_recompute", RECOMPUTE_BUDGET)]
    budgets = keeping if device == "cuda" else [("fastgrpo", RECOMPUTE_BUDGET)]
    return [
        *(side(name, _ours(budget)) for name, budget in budgets),
        side("torch", plain_logprob),
        side("compile", torch.compile(plain_logprob, dynamic=False)),
        side("liger", _liger_chunked, gives_loss=True),
        side("liger_triton", _liger_triton, gives_loss=True),
        side("cce", _cce),
        side("trl", _trl),
    ]


def side(name: str, apply: Callable[[HeadInputs], Tensor], *, gives_loss: bool = False) -> Side:
    """Both passes, and the forward one as of the reference model.

    Args:
        apply: gives differentiable log-probs [T], or the scalar loss whose gradient in them is `grad_logprobs`.
        gives_loss: the latter.
    """

    def run(x: HeadInputs) -> Results:
        leaves = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
        output = apply(x._replace(hidden=leaves[0], weight=leaves[1]))
        gradients = torch.autograd.grad(output, leaves, None if gives_loss else x.grad_logprobs)
        found = dict(zip(("grad_hidden", "grad_weight"), gradients, strict=True))
        return found if gives_loss else {**found, "logprobs": output.detach()}

    return Side(name, run, None if gives_loss else torch.no_grad()(apply))


def _inputs(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str) -> HeadInputs:
    """Logits spread as N(0, 3²)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    return HeadInputs(
        hidden=normal(tokens, hidden_size).to(dtype),
        weight=normal(vocabulary, hidden_size).mul_(3 * hidden_size**-0.5).to(dtype),
        targets=torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        advantages=normal(1 if tokens % 8 else 8),
    )


def exact_head(x: HeadInputs) -> Results:
    """Both passes written out in float64, `TRUTH_ROWS` rows at a time."""
    weight, upstream = x.weight.double(), x.grad_logprobs.double()
    logprobs, grad_hidden, grad_weight = [], [], torch.zeros_like(weight)
    for start in range(0, len(x.targets), TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        hidden, targets = x.hidden[rows].double(), x.targets[rows, None]
        grad_logits = torch.log_softmax(hidden @ weight.T, dim=-1)  # [R, V]
        logprobs.append(grad_logits.gather(1, targets).squeeze(1))
        grad_logits.exp_().scatter_add_(1, targets, targets.new_full(targets.shape, -1).double())
        grad_logits.mul_(-upstream[rows, None])
        grad_hidden.append(grad_logits @ weight)
        grad_weight.addmm_(grad_logits.T, hidden)
    return {"grad_hidden": torch.cat(grad_hidden), "grad_weight": grad_weight, "logprobs": torch.cat(logprobs)}


def plain_logprob(x: HeadInputs) -> Tensor:
    """All of the logits at once, as one would write it."""
    logp = F.linear(x.hidden, x.weight).float().log_softmax(dim=-1)
    return logp.gather(1, x.targets[:, None]).squeeze(1)


def _ours(byte_budget: int) -> Callable[[HeadInputs], Tensor]:
    return lambda x: linear_logprob(x.hidden, x.weight, x.targets, byte_budget=byte_budget).logprobs


def _liger_chunked(x: HeadInputs) -> Tensor:
    """Liger's GRPO loss fused with the head, at beta 0 and on policy; compiled, as it is by default."""
    fused = _attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    hidden, targets = x.by_sequence
    loss = fused(beta=0.0, use_ref_model=False, loss_type="dr_grpo", max_completion_length=targets.shape[1])
    return loss(hidden, x.weight, targets, torch.ones_like(targets), x.advantages)[0]


def _liger_triton(x: HeadInputs) -> Tensor:
    """A plain GEMM, then Liger's Triton loss over the logits, at beta 0 and on policy."""
    _require_cuda(x)
    triton_loss = _attribute("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    hidden, targets = x.by_sequence
    logits = F.linear(F.pad(hidden, (0, 0, 0, 1)), x.weight)  # it takes those of one position more than it uses
    options = {"temperature": 1.0, "beta": 0.0, "loss_type": "dapo", "reduce": True}
    return triton_loss(logits, None, None, targets, x.advantages, **options)[0]


def _cce(x: HeadInputs) -> Tensor:
    """Cut Cross-Entropy without its gradient filter, which knows nothing of advantages and biases a policy gradient."""
    _require_cuda(x)
    loss = _attribute("cut_cross_entropy", "linear_cross_entropy")
    return -loss(x.hidden, x.weight, x.targets, reduction="none", filter_eps=None)


def _trl(x: HeadInputs) -> Tensor:
    """TRL's fused head."""
    if not x.hidden.is_cuda:
        importlib.import_module("fastgrpo.profile.sides.trl_on_cpu")
    function = _attribute("trl.kernels", "ChunkedLogProbFunction")
    arguments = x.hidden, x.weight, None, x.targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
    return function.apply(*arguments)[0]


def _require_cuda(x: HeadInputs) -> None:
    if not x.hidden.is_cuda:
        raise NotImplementedError("Triton needs CUDA")


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
