"""A watch over code that a CUDA graph must hold."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DeviceOnly(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: host reads, shapes that depend on values, tensors off the device."""

    VALUE_READS = ("_local_scalar_dense", "item", "equal", "is_nonzero")
    VALUE_SHAPES = ("nonzero", "masked_select", "unique", "_unique2", "bincount", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        refused = [r for r in (*self.VALUE_READS, *self.VALUE_SHAPES) if name == r or name.startswith(r + ".")]
        assert not refused, f"{func} in the decode step"
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.is_cuda, f"{func} touches a tensor on {leaf.device}"
        self.calls += 1
        return result


class PlainIndexing(TorchFunctionMode):
    """Makes x[…] of slices, None and tensors out of operators: torch's own looks for the device, which a fake lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            return indexed(*args)
        if name == "__setitem__":
            return torch.ops.aten.copy_.default(indexed(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))


def indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """tensor[index]; a view but for tensors in the index."""
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
        place = [i is Ellipsis for i in index].index(True)
        missing = tensor.ndim - sum(i is not None for i in index) + 1
        index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
    axis = 0
    for i in index:
        if i is None:
            tensor, axis = tensor.unsqueeze(axis), axis + 1
        elif isinstance(i, int):
            tensor = tensor.select(axis, i)
        elif isinstance(i, slice):
            start, stop, step = i.indices(tensor.shape[axis])
            tensor, axis = torch.ops.aten.slice(tensor, axis, start, stop, step), axis + 1
        else:
            tensor, axis = tensor.index_select(axis, i), axis + 1
    return tensor
