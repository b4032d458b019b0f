"""Programmatic dependent launch: a kernel's programs start while the kernel in front of it is still ending.

The rule, for every kernel launched with `early`: all of its programs call `wait_for_inputs` before they read anything
that another kernel wrote (weights too, which a refresh may have written) and before they write anything. Until then
they may compute addresses and `ask_for` weights. Since every program waits, whatever ran before has ended, too.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgrpo_kernels.tl_utils import target_arch

LINE = tl.constexpr(64)
"""Elements of half precision in a cache line."""


def early(tensor: Tensor) -> dict[str, bool]:
    """Arguments of the launch of a kernel that follows the rule: from sm_90 on, and not under the interpreter."""
    if tensor.device.type == "cpu" or target_arch() < 90:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr) -> None:
    """Waits for the end of the kernels in front, then lets the next one start."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def ask_for(address: tl.tensor) -> None:
    """Brings the cache lines at these addresses to L2, where all kernels read and write: never a stale copy."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
