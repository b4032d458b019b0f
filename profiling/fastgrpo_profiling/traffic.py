"""Counts kernels launched and bytes moved by the operators that run; needs neither a device nor a clock."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach")
"""Operators that launch nothing although their results are no views."""


class Traffic(TorchDispatchMode):
    """While open, counts each computing operator as one kernel that reads its inputs and writes its results once.
    Works on real and fake tensors; includes a backward pass on the calling thread.

    A custom operator counts as one, whatever it launches.
    """

    def __init__(self, leaves_out: Callable[[str], bool] = lambda name: False) -> None:
        """`leaves_out`: whether an operator, by name (`aten::mm`), is not counted."""
        super().__init__()
        self.leaves_out = leaves_out
        self.kernels: Counter[str] = Counter()
        """Calls by operator."""
        self.bytes: Counter[str] = Counter()
        """Bytes by operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not self.leaves_out(name) and not _is_free(func):
            self.kernels[name] += 1
            touched = [*_tensors((args, kwargs, out)), *_written(func, args)]
            self.bytes[name] += sum(map(_touched, touched))
        return out


def _is_free(func: Any) -> bool:
    """Whether it launches no kernel: it only looks something up, allocates, or returns views of its inputs."""
    namespace, name = func._schema.name.split("::")
    returns = func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return namespace == "prim" or name in FREE or is_view


def _written(func: Any, args: Any) -> Iterator[Tensor]:
    """Arguments that are written but not returned."""
    returned = {name for r in func._schema.returns if r.alias_info for name in r.alias_info.before_set}
    for value, argument in zip(args, func._schema.arguments, strict=False):
        info = argument.alias_info
        if info is not None and info.is_write and not info.before_set & returned and isinstance(value, Tensor):
            yield value


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _touched(tensor: Tensor) -> int:
    """Bytes of its elements; elements repeated by an expanded dimension count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()
