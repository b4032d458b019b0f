"""Picks the fastest of several implementations: checked and timed once on the user's GPU, then remembered.

    name = pick("my_op", (rows, width), x, {"cublas": lambda: ..., "ours": lambda: ...}, default="cublas",
                agrees=lambda result: close(result, reference))

A choice is kept in memory and in `choices.json` in the user's cache folder (`XDG_CACHE_HOME/fastgrpo`, or
`~/.cache/fastgrpo`), under the op, the shape, the dtype, the GPU's name and the versions of torch and triton. Delete
the file to measure anew. FASTGRPO_AUTOPICK=0 turns measuring off: the default is then taken.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

VARIABLE = "FASTGRPO_AUTOPICK"
"""Environment variable: 0 turns measuring off."""

ROUNDS = 9
"""How often each candidate is timed, in turn with the others."""

FLUSHED_BYTES = 1.5e9
"""Bytes written before each timed call, to empty the L2 cache. It takes about 0.5 ms at 3 TB/s, so the host gets ahead
and kernels are timed, not launches."""

_log = logging.getLogger(__name__)

Candidates = Mapping[str, Callable[[], Any]]
Timer = Callable[[Candidates, torch.device], dict[str, float]]


def pick(
    op: str,
    shape: tuple[object, ...],
    tensor: Tensor,
    candidates: Candidates,
    *,
    default: str,
    agrees: Callable[[Any], bool],
    in_graph: bool = False,
) -> str:
    """The name of the candidate to use.

    Does not measure during CUDA graph capture, for a tensor without data, or on CPU: then uses the remembered choice or
    the default.

    Args:
        op: what is computed; change the name (say, a number at its end) to forget older choices.
        shape: what the choice depends on beside `tensor`'s dtype and device.
        tensor: one of the inputs.
        candidates: each computes the same result on the same inputs and may be called many times. One that raises is
            excluded.
        default: the candidate to use unmeasured.
        agrees: whether a candidate's result is right. If none is, the default is used and a warning logged.
        in_graph: whether candidates are timed in CUDA graphs: for kernels that overlap, many in a call, whose launches
            take the host longer than they run.
    """
    if not tensor.is_cuda or isinstance(tensor, FakeTensor) or os.environ.get(VARIABLE) == "0":
        return default
    device = tensor.device
    key = _key(op, shape, tensor.dtype, torch.cuda.get_device_name(device))
    with torch.cuda.device(device):
        may_measure = not torch.cuda.is_current_stream_capturing()
    return _choices.pick(key, candidates, default, agrees, device, may_measure)


class Choices:
    """Choices made so far, in memory and in a file."""

    def __init__(self, path: Path, timer: Timer) -> None:
        """`timer`: seconds of each candidate, on a device."""
        self.path = path
        self.timer = timer
        self._known: dict[str, str] | None = None

    def pick(
        self,
        key: str,
        candidates: Candidates,
        default: str,
        agrees: Callable[[Any], bool],
        device: torch.device,
        may_measure: bool = True,
        prepared: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
    ) -> str:
        """`pick`, for a key that holds all that the choice depends on; `prepared`: what is timed of a candidate."""
        if self._known is None:
            self._known = self._read()
        known = self._known.get(key)
        if known is not None and known in candidates:
            return known
        if not may_measure or len(candidates) == 1:
            return default
        right = {name: call for name, call in candidates.items() if _is_right(name, key, call, agrees)}
        if right:
            timed = {name: prepared(call) for name, call in right.items()} if prepared else right
            times = self.timer(timed, device) if len(right) > 1 else {}
            choice = min(times, key=times.__getitem__) if times else next(iter(right))
            shown = ", ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in times.items())
            _log.info("%s: %s (%s)", key, choice, shown or "the only one that is right")
        else:
            choice = default
            _log.warning("%s: no candidate gives the right result; %s is used unchecked", key, default)
        self._known[key] = choice
        self._write()
        return choice

    def _read(self) -> dict[str, str]:
        """The file's choices; none if it is missing or unreadable."""
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {key: name for key, name in stored.items() if isinstance(name, str)}

    def _write(self) -> None:
        """Merges with other processes' choices; replaces the file as a whole."""
        assert self._known is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            merged = self._read() | self._known
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".json", delete=False) as file:
                json.dump(merged, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            _log.info("choices are kept in memory only: %s", error)


def cache_file() -> Path:
    """The file that keeps choices between runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastgrpo" / "choices.json"


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call's kernels in a CUDA graph; its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def device_times(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate's kernels, from a cold L2 cache; the candidates take turns."""
    with torch.cuda.device(device):
        properties = torch.cuda.get_device_properties(device)
        spare = torch.empty(max(2 * properties.L2_cache_size, 2**26), dtype=torch.uint8, device=device)
        writes = max(1, int(FLUSHED_BYTES / spare.numel()))
        events: dict[str, list[Any]] = {name: [] for name in candidates}
        for _ in range(ROUNDS + 1):
            for name, call in candidates.items():
                for _ in range(writes):
                    spare.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize(device)
        # The first round compiles and warms up.
        return {
            name: median(1e-3 * start.elapsed_time(end) for start, end in pairs[1:]) for name, pairs in events.items()
        }


def _is_right(name: str, key: str, call: Callable[[], Any], agrees: Callable[[Any], bool]) -> bool:
    try:
        right = agrees(call())
    except Exception as error:  # a candidate may fail to compile or to fit the GPU: use the others
        _log.warning("%s: %s is out: %s", key, name, error)
        return False
    if not right:
        _log.warning("%s: %s is out: its result is wrong", key, name)
    return right


def _key(op: str, shape: tuple[object, ...], dtype: torch.dtype, device_name: str) -> str:
    sizes = " ".join(map(str, shape))
    return f"{op} | {sizes} | {dtype} | {device_name} | torch {torch.__version__} | triton {triton.__version__}"


_choices = Choices(cache_file(), device_times)
