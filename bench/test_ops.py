"""The ops' sides as a pytest-benchmark suite, each after its results were found right. `make bench`.

The same ops, inputs and sides as `bench_kernels.py`, at one small shape each. `gate.py` reads the roles of the sides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import gate
import pytest
import torch
from sides import OURS, Op, Side
from sides.head import head_op
from sides.loss import loss_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {op.name: op for op in (head_op(512, 256, 32_000, torch.float32, DEVICE), loss_op(1 << 16, DEVICE))}
SIDES = {name: {side.name: side for side in op.sides()} for name, op in OPS.items()}
ROLES = {OURS[0]: gate.OURS, "torch": gate.REFERENCE}


@pytest.fixture(scope="module")
def prepared() -> dict[str, tuple[Any, Any, dict[str, float]]]:
    """Of each op: inputs, exact results, plain torch's errors."""
    found = {}
    for name, op in OPS.items():
        inputs = op.make_inputs()
        exact = op.exact(inputs)
        found[name] = inputs, exact, op.errors(SIDES[name]["torch"].run(inputs), exact)
    return found


@pytest.mark.parametrize(
    ("op", "side"),
    [
        pytest.param(op, side, id=f"{name}-{side.name}", marks=pytest.mark.benchmark(group=name, timer=gate.TIMER))
        for name, op in OPS.items()
        for side in SIDES[name].values()
    ],
)
def test_op(timed: Callable[..., None], prepared: dict[str, Any], op: Op, side: Side) -> None:
    inputs, exact, torch_errors = prepared[op.name]
    try:
        found = side.run(inputs)
    except (ImportError, NotImplementedError) as reason:
        pytest.skip(str(reason))
    assert not op.fault(side.name, op.errors(found, exact), torch_errors)
    timed(ROLES.get(side.name, gate.PEER), partial(side.run, inputs), rounds=20)
