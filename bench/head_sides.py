"""The LM head's log-probs as we and others compute them, behind one signature, and the exact results."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fastgrpo_kernels import linear_logprob
from torch import Tensor

KEEP_BUDGET = 1 << 62
"""Bytes: the logits of all rows are kept for the backward pass."""
RECOMPUTE_BUDGET = 1 << 30
TRL_VOCABULARY_CHUNK = 32_768
"""What TRL passes."""
TRUTH_ROWS = 512


@dataclass(frozen=True)
class HeadInputs:
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


@dataclass(frozen=True)
class HeadResult:
    """Forward and backward; or exact float64 values."""

    grad_hidden: Tensor
    grad_weight: Tensor
    logprobs: Tensor | None
    """[T]; None of a side that hands out the loss alone."""


@dataclass(frozen=True)
class HeadSide:
    """One implementation."""

    name: str
    apply: Callable[[HeadInputs], Tensor]
    """Differentiable log-probs [T]; or the scalar loss whose gradient in them is `grad_logprobs`."""
    gives_loss: bool = False

    @property
    def forward_only(self) -> bool:
        """A pass without gradients, as of the reference model; what gives the loss has none."""
        return not self.gives_loss

    def forward(self, inputs: HeadInputs) -> Tensor:
        with torch.no_grad():
            return self.apply(inputs)

    def forward_backward(self, inputs: HeadInputs) -> HeadResult:
        """Gradients of the hidden states and of the weight, both in the inputs' dtype."""
        leaves = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
        output = self.apply(replace(inputs, hidden=leaves[0], weight=leaves[1]))
        upstream = None if self.gives_loss else inputs.grad_logprobs
        grad_hidden, grad_weight = torch.autograd.grad(output, leaves, upstream)
        return HeadResult(grad_hidden, grad_weight, None if self.gives_loss else output.detach())


def make_head_inputs(
    tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str, sequences: int = 8
) -> HeadInputs:
    """Logits spread as N(0, 3²); `sequences` divides `tokens`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    return HeadInputs(
        hidden=normal(tokens, hidden_size).to(dtype),
        weight=normal(vocabulary, hidden_size).mul_(3 * hidden_size**-0.5).to(dtype),
        targets=torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        advantages=normal(sequences),
    )


def exact_head(inputs: HeadInputs) -> HeadResult:
    """Both passes written out in float64, `TRUTH_ROWS` rows at a time."""
    weight, upstream = inputs.weight.double(), inputs.grad_logprobs.double()
    logprobs, grad_hidden, grad_weight = [], [], torch.zeros_like(weight)
    for start in range(0, len(inputs.targets), TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        hidden, targets = inputs.hidden[rows].double(), inputs.targets[rows, None]
        grad_logits = torch.log_softmax(hidden @ weight.T, dim=-1)  # [R, V]
        logprobs.append(grad_logits.gather(1, targets).squeeze(1))
        grad_logits.exp_().scatter_add_(1, targets, targets.new_full(targets.shape, -1).double())
        grad_logits.mul_(-upstream[rows, None])
        grad_hidden.append(grad_logits @ weight)
        grad_weight.addmm_(grad_logits.T, hidden)
    return HeadResult(torch.cat(grad_hidden), grad_weight, torch.cat(logprobs))


def head_errors(result: HeadResult, exact: HeadResult) -> dict[str, float]:
    """Relative error (Frobenius norm) of each gradient, and the greatest absolute one of the log-probs, in nats."""
    errors = {
        name: float(torch.linalg.norm(getattr(result, name).double() - getattr(exact, name)))
        / float(torch.linalg.norm(getattr(exact, name)))
        for name in ("grad_hidden", "grad_weight")
    }
    if result.logprobs is not None and exact.logprobs is not None:
        errors["logprobs"] = float((result.logprobs.double() - exact.logprobs).abs().max())
    return errors


def plain_logprob(inputs: HeadInputs) -> Tensor:
    """All of the logits at once, as one would write it."""
    logp = F.linear(inputs.hidden, inputs.weight).float().log_softmax(dim=-1)
    return logp.gather(1, inputs.targets[:, None]).squeeze(1)


def ours(name: str, byte_budget: int) -> HeadSide:
    """`linear_logprob`: Triton on CUDA, the reference on CPU."""

    def apply(inputs: HeadInputs) -> Tensor:
        return linear_logprob(inputs.hidden, inputs.weight, inputs.targets, byte_budget=byte_budget).logprobs

    return HeadSide(name, apply)


def head_sides(device: str) -> tuple[list[HeadSide], dict[str, str]]:
    """Ours, plain torch, then the peers that can run here; and why the others cannot."""
    if device == "cuda":
        sides = [ours("fastgrpo", KEEP_BUDGET), ours("fastgrpo_recompute", RECOMPUTE_BUDGET)]
    else:
        sides = [ours("fastgrpo", RECOMPUTE_BUDGET)]
    sides.append(HeadSide("torch", plain_logprob))
    peers = {"compile": _compiled, "liger": _liger_chunked, "liger_triton": _liger_triton, "cce": _cce, "trl": _trl}
    left_out = {}
    for name, build in peers.items():
        try:
            sides.append(build(device))
        except (ImportError, NotImplementedError) as reason:
            left_out[name] = str(reason)
    return sides, left_out


def _compiled(device: str) -> HeadSide:
    return HeadSide("compile", torch.compile(plain_logprob, dynamic=False))


def _liger_chunked(device: str) -> HeadSide:
    """Liger's GRPO loss fused with the head, at beta 0 and on policy; compiled, as it is by default."""
    fused = _attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def apply(inputs: HeadInputs) -> Tensor:
        sequences, length = len(inputs.advantages), len(inputs.targets) // len(inputs.advantages)
        loss = fused(beta=0.0, use_ref_model=False, loss_type="dr_grpo", max_completion_length=length)
        hidden, targets = inputs.hidden.view(sequences, length, -1), inputs.targets.view(sequences, length)
        return loss(hidden, inputs.weight, targets, torch.ones_like(targets), inputs.advantages)[0]

    return HeadSide("liger", apply, gives_loss=True)


def _liger_triton(device: str) -> HeadSide:
    """A plain GEMM, then Liger's Triton loss over the logits, at beta 0 and on policy."""
    if device != "cuda":
        raise NotImplementedError("Triton needs CUDA")
    triton_loss = _attribute("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")

    def apply(inputs: HeadInputs) -> Tensor:
        sequences, length = len(inputs.advantages), len(inputs.targets) // len(inputs.advantages)
        # It takes the logits of one position more than it uses.
        hidden = F.pad(inputs.hidden.view(sequences, length, -1), (0, 0, 0, 1))
        targets = inputs.targets.view(sequences, length)
        options = {"temperature": 1.0, "beta": 0.0, "loss_type": "dapo", "reduce": True}
        return triton_loss(F.linear(hidden, inputs.weight), None, None, targets, inputs.advantages, **options)[0]

    return HeadSide("liger_triton", apply, gives_loss=True)


def _cce(device: str) -> HeadSide:
    """Cut Cross-Entropy without its gradient filter, which knows nothing of advantages and biases a policy gradient."""
    if device != "cuda":
        raise NotImplementedError("Triton needs CUDA")
    loss = _attribute("cut_cross_entropy", "linear_cross_entropy")

    def apply(inputs: HeadInputs) -> Tensor:
        return -loss(inputs.hidden, inputs.weight, inputs.targets, reduction="none", filter_eps=None)

    return HeadSide("cce", apply)


def _trl(device: str) -> HeadSide:
    """TRL's fused head."""
    if device != "cuda":
        importlib.import_module("fastgrpo.profile.sides.trl_on_cpu")
    function = _attribute("trl.kernels", "ChunkedLogProbFunction")

    def apply(inputs: HeadInputs) -> Tensor:
        arguments = inputs.hidden, inputs.weight, None, inputs.targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
        return function.apply(*arguments)[0]

    return HeadSide("trl", apply)


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
