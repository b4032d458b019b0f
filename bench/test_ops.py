"""The ops' sides as a pytest-benchmark suite, each after its results were found right. `make bench`.

The same ops, inputs and sides as `bench_kernels.py`, at one small shape each.
"""

from typing import Any

import pytest
import torch
from kernel_ops import Op, Side, head_op, loss_op, sides_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {op.name: op for op in (head_op(512, 256, 32_000, torch.float32, DEVICE), loss_op(1 << 16, DEVICE))}
SIDES = {name: {side.name: side for side in sides_of(name, DEVICE)[0]} for name in OPS}


@pytest.fixture(scope="module")
def prepared() -> dict[str, tuple[Any, Any, dict[str, float]]]:
    """Of each op: inputs, exact results, plain torch's errors."""
    found = {}
    for name, op in OPS.items():
        inputs = op.make_inputs()
        exact = op.exact(inputs)
        found[name] = inputs, exact, op.errors(SIDES[name]["torch"].forward_backward(inputs), exact)
    return found


@pytest.mark.parametrize(
    ("op", "side"),
    [
        pytest.param(op, side, id=f"{name}-{side.name}", marks=pytest.mark.benchmark(group=f"{name} {op.shape}"))
        for name, op in OPS.items()
        for side in SIDES[name].values()
    ],
)
def test_forward_backward(benchmark: Any, prepared: dict[str, Any], op: Op, side: Side) -> None:
    inputs, exact, torch_errors = prepared[op.name]
    assert not op.fault(side.name, op.errors(side.forward_backward(inputs), exact), torch_errors)
    benchmark.pedantic(side.forward_backward, args=(inputs,), rounds=5, warmup_rounds=1)
