"""The first layer of a Qwen vision tower as the matrix product that it is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.model.replaced_forward import replaced_forward


@contextmanager
def patches_by_matmul(*towers: Any) -> Iterator[None]:
    """Meanwhile these vision towers (None is passed over) embed their patches by a matrix product.

    transformers uses a Conv3d over one patch at a time, whose stride is its kernel: the same sum, for which torch has
    kernels several times slower. The weight stays the convolution's, and its `__call__`, so hooks work as before.
    """
    found = [getattr(getattr(tower, "patch_embed", None), "proj", None) for tower in towers]
    replaced = [layer for layer in found if type(layer) is nn.Conv3d and layer.stride == layer.kernel_size]
    with ExitStack() as stack:
        for convolution in replaced:
            stack.enter_context(replaced_forward(convolution, partial(_product, convolution)))
        yield


def _product(convolution: nn.Conv3d, patches: Tensor) -> Tensor:
    """[patches, C, T, P, P] to [patches, E]."""
    return F.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
