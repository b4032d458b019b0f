"""What a decode step launches beside its matrix products: attention over pages, rotation, sampling."""

from collections.abc import Iterator

from harness import Result
from kernel_ops import decode_ops

from stages.head import timed


def run(scale: str, device: str) -> Iterator[Result]:
    """Each op of one layer, and sampling, at a step's batch sizes."""
    yield from timed(Result("decode_ops", device), decode_ops(device, "full" if scale == "full" else "tiny"), scale)
