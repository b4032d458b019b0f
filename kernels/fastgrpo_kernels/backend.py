"""Which implementation of an op runs: plain torch (the reference) or Triton."""

import os
from typing import Literal

from torch import Tensor

Backend = Literal["torch", "triton"]

VARIABLE = "FASTGRPO_KERNELS"
"""Environment variable that forces a backend: auto (the default), torch or triton."""


def pick_backend(tensor: Tensor, forced: Backend | None = None) -> Backend:
    """Triton for CUDA tensors, torch for all others; `forced`, or else the environment variable, overrules.

    Raises:
        ValueError: an unknown backend, or triton for tensors that no GPU holds. (Under TRITON_INTERPRET=1, Triton
            runs on CPU tensors; that is for tests.)
    """
    name = forced or os.environ.get(VARIABLE) or "auto"
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"{VARIABLE}={name!r} is not a backend: use auto, torch or triton.")
    if name == "torch" or (name == "auto" and not tensor.is_cuda):
        return "torch"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend triton needs CUDA tensors, these are on {tensor.device}: use torch or auto.")
    return "triton"
