"""Computes the patch embedding of a Qwen vision tower as a matrix product."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.model.replaced_forward import replaced_forward


@contextmanager
def patches_by_matmul(*towers: Any) -> Iterator[None]:
    """Within this context, these vision towers (None is skipped) embed their patches by a matrix product.

    transformers uses a Conv3d whose stride is its kernel size: the same sum, but torch's kernels for it are several
    times slower. Only the convolution's `forward` is replaced, so its weight and its hooks stay.
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
