"""What the multiprocessors of GPUs hold, how a launch fills them, and the least time that its work takes."""

import math
from dataclasses import dataclass
from typing import NamedTuple

REGISTERS = 65_536
"""Of a multiprocessor, since sm_80."""
BF16_FLOPS, BYTES = 798e12, 3.0e12
"""A second, of an H100: large bfloat16 products, and memory read or written. Floors are worked out with these."""


@dataclass(frozen=True)
class Gpu:
    """Limits from the CUDA programming guide, "Technical Specifications per Compute Capability"."""

    name: str
    multiprocessors: int
    warps: int
    """Of one multiprocessor at a time."""
    blocks: int
    """Of one multiprocessor at a time."""
    shared: int
    """Bytes of a multiprocessor."""

    @property
    def block_shared(self) -> int:
        """Bytes that a block may have: 1 KiB of each block's is the system's."""
        return self.shared - 1024


GPUS = {
    80: Gpu("A100", 108, warps=64, blocks=32, shared=164 << 10),
    89: Gpu("L40S", 142, warps=48, blocks=24, shared=100 << 10),
    90: Gpu("H100", 132, warps=64, blocks=32, shared=228 << 10),
    100: Gpu("B200", 148, warps=64, blocks=32, shared=228 << 10),
    120: Gpu("RTX 5090", 170, warps=48, blocks=24, shared=100 << 10),
}
"""By architecture, a GPU of each."""


class Filling(NamedTuple):
    """How a launch fills a GPU."""

    occupancy: float
    """Share of the warps that a multiprocessor can have, while it is full."""
    waves: float
    """Blocks over those that run at once. Below 1, some multiprocessors have nothing, or less than they could."""
    tail: float
    """Share of the last wave that is empty, of all waves' time: 0.5 for one and a half waves would be 0.25."""


def filling(gpu: Gpu, blocks: int, warps: int, registers: int, shared: int) -> Filling:
    """Of so many blocks, with so many warps and bytes of shared memory each, and registers a thread."""
    by_registers = REGISTERS // _up(32 * registers, 256) // 4 * 4 // warps  # warps come in fours, registers in 256s
    by_shared = gpu.shared // (_up(shared, 128) + 1024)
    resident = min(gpu.blocks, gpu.warps // warps, by_registers, by_shared)
    if resident == 0:  # a block alone does not fit
        return Filling(0.0, math.inf, 0.0)
    waves = blocks / (resident * gpu.multiprocessors)
    return Filling(resident * warps / gpu.warps, waves, 1 - waves / math.ceil(waves) if waves else 0.0)


def floor_seconds(flops: float, moved: float) -> float:
    """The longer of both, on an H100; `moved` in bytes."""
    return max(flops / BF16_FLOPS, moved / BYTES)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
