"""`grpo_loss` as an operator: backends, torch.compile, checkpointing, layouts, and what it refuses."""

import sys
from typing import Any

import pytest
import torch
from fastgrpo_kernels import LossParams, grpo_loss, reference
from fastgrpo_kernels.backend import Backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = sys.modules["fastgrpo_kernels.grpo_loss"]  # the package's attribute of that name is the op
OPERANDS = (
    "logprobs",
    "advantages",
    "weights",
    "cu_seqlens",
    "old_logprobs",
    "ref_logprobs",
    "mask",
    "policy_scale",
    "entropy",
    "entropy_weights",
)
"""The operator's tensors, in its order."""
PARAMS = LossParams(level="sequence", epsilon_high=0.05, beta=0.1, kl_bias_correction=True)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 0, 1, 9, 3]
    names = ("logprobs", "old_logprobs", "ref_logprobs", "weights", "policy_scale", "entropy", "entropy_weights")
    data = {name: torch.randn(sum(lengths), generator=generator).to(dtype) for name in names}
    data["advantages"] = torch.randn(len(lengths), generator=generator).to(dtype)
    data["mask"] = torch.rand(sum(lengths), generator=generator) < 0.8
    data["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    data = {name: values.to(DEVICE) for name, values in data.items()}
    return {name: values.requires_grad_(name in ("logprobs", "entropy")) for name, values in data.items()}


def gradients(loss: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (data["logprobs"], data["entropy"]))


@each_backend
def test_torch_compile_takes_it_whole(backend: Backend) -> None:
    data = batch()

    def step(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = grpo_loss(params=PARAMS, backend=backend, **values)
        return 2 * output.loss, output.metrics.kl_sum

    expected, kl = step(data)
    loss, compiled_kl = torch.compile(step, fullgraph=True, backend="aot_eager")(data)
    torch.testing.assert_close((loss, compiled_kl), (expected, kl))
    torch.testing.assert_close(gradients(loss, data), gradients(expected, data))


@each_backend
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(backend: Backend, reentrant: bool) -> None:
    data = batch()
    fixed = {name: values for name, values in data.items() if name not in ("logprobs", "entropy")}

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return grpo_loss(logprobs, entropy=entropy, params=PARAMS, backend=backend, **fixed).loss

    expected = loss(data["logprobs"], data["entropy"])
    expected.backward()
    plain = [data[name].grad.clone() for name in ("logprobs", "entropy")]
    data["logprobs"].grad = data["entropy"].grad = None
    checkpoint(loss, data["logprobs"], data["entropy"], use_reentrant=reentrant).backward()
    assert all(torch.equal(data[n].grad, g) for n, g in zip(("logprobs", "entropy"), plain, strict=True))


def test_the_operator_is_registered_soundly() -> None:
    data = {name: values.detach() for name, values in batch().items()}
    inputs = [data[name] for name in OPERANDS]
    torch.library.opcheck(torch.ops.fastgrpo_kernels.grpo_loss.default, (*inputs, *vars(PARAMS).values()))


def test_the_backward_scales_with_the_upstream_gradient_and_runs_once() -> None:
    data = batch()
    loss = grpo_loss(params=PARAMS, backend="triton", **data).loss
    again = grpo_loss(params=PARAMS, backend="triton", **data).loss
    for tripled, single in zip(gradients(3 * loss, data), gradients(again, data), strict=True):
        torch.testing.assert_close(tripled, 3 * single)
    squared = grpo_loss(params=PARAMS, backend="triton", **data).loss ** 2
    (gradient,) = torch.autograd.grad(squared, data["logprobs"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_gradient_there_is_none() -> None:
    data = {name: values.detach() for name, values in batch().items()}
    output = grpo_loss(params=PARAMS, backend="triton", **data)
    assert not output.loss.requires_grad
    data = batch()
    output = grpo_loss(params=PARAMS, backend="triton", **data)
    assert output.loss.requires_grad
    assert not any(value.requires_grad or value.shape for value in output.metrics)


@each_backend
def test_inputs_need_not_be_contiguous(backend: Backend) -> None:
    data = batch()
    strided = {name: torch.stack([v.detach(), v.detach()], dim=1)[:, 0] for name, v in data.items()}
    assert not strided["mask"].is_contiguous()
    strided = {name: values.requires_grad_(data[name].requires_grad) for name, values in strided.items()}
    expected, actual = (grpo_loss(params=PARAMS, backend=backend, **d).loss for d in (data, strided))
    assert actual == expected
    assert all(map(torch.equal, gradients(actual, strided), gradients(expected, data)))


@each_backend
def test_int32_offsets_will_do(backend: Backend) -> None:
    data = batch()
    expected = grpo_loss(params=PARAMS, backend=backend, **data).loss
    assert (
        grpo_loss(params=PARAMS, backend=backend, **{**data, "cu_seqlens": data["cu_seqlens"].int()}).loss == expected
    )


def test_float64_is_computed_by_the_reference() -> None:
    data = batch(torch.float64)
    loss = grpo_loss(params=PARAMS, backend="triton", **data).loss
    assert loss.dtype == torch.float64
    assert loss == reference.grpo_loss(params=PARAMS, **data).loss


def test_the_backend_is_chosen_by_device_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch()

    def takes_triton(backend: Backend | None = None) -> bool:
        with OperatorNames() as seen:
            grpo_loss(params=PARAMS, backend=backend, **data)
        return "fastgrpo_kernels::grpo_loss" in seen.names

    monkeypatch.delenv("FASTGRPO_KERNELS", raising=False)
    assert takes_triton() == (DEVICE == "cuda")
    assert takes_triton("triton")
    monkeypatch.setenv("FASTGRPO_KERNELS", "triton")
    assert takes_triton()
    assert not takes_triton("torch")


class OperatorNames(TorchDispatchMode):
    """Notes every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


PER_TOKEN = ("weights", "old_logprobs", "ref_logprobs", "mask", "policy_scale", "entropy", "entropy_weights")


@each_backend
def test_arguments_that_do_not_fit_are_refused_by_name(backend: Backend) -> None:
    data = batch()

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            grpo_loss(**{"params": PARAMS, "backend": backend, **data, **changes})

    for name in PER_TOKEN:
        refused(rf"{name} has shape \[17\], logprobs \[18\]", **{name: data[name][:-1]})
        refused(f"{name} holds torch.int32", **{name: data[name].detach().int()})
    for name in (*PER_TOKEN, "advantages", "cu_seqlens"):
        refused(f"{name} is on meta, logprobs on {DEVICE}", **{name: data[name].to("meta")})
    refused(r"logprobs has shape \[1, 18\]", logprobs=data["logprobs"][None])
    refused("logprobs holds torch.int64", logprobs=data["logprobs"].detach().long())
    refused(r"advantages has shape \[5, 1\]", advantages=data["advantages"][:, None])
    refused(r"cu_seqlens has shape \[5\]: pass 5 \+ 1", cu_seqlens=data["cu_seqlens"][:-1])
    refused("cu_seqlens holds torch.float32", cu_seqlens=data["cu_seqlens"].float())
    refused(r"beta=0\.1 needs ref_logprobs", ref_logprobs=None)
    refused("entropy_weights needs entropy", entropy=None)
    if DEVICE == "cpu":
        refused("cu_seqlens ends at 17", cu_seqlens=(data["cu_seqlens"] - 1).clamp(min=0))


def test_every_surrogate_and_level_is_compiled_ahead_of_time() -> None:
    labels = [label for label, _ in MODULE.aot_cases()]
    assert len(labels) == len(set(labels)) == 4 * 2 * 4
