"""Caches what a frozen vision tower sees in each picture, for sampling, the update and the frozen reference together.

It is cached *before* what maps it into the language model, which `freeze_vision` leaves trainable and which runs at
every call, with its gradient: the mergers within towers of Qwen's kind, the projector behind towers of tiles.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastgrpo.model.replaced_forward import replaced_forward

Features = tuple[Tensor, ...]
"""Of a picture: what each merger is given, [image tokens, patches of one, dim]; or the hidden states that the model
takes, [tiles, places, dim]."""
Fingerprint = list[tuple[int, int]]
"""Per parameter: its address, and its version, which counts writes in place."""


class VisionCache:
    """An LRU cache of image features, for one vision tower and for copies of it with equal weights.

    A tower that trains is not cached, nor one that ZeRO-3 has partitioned: its ranks must gather equally often. Loading
    weights empties the cache. It does not notice weights changed through `.data`: call `clear`.
    """

    def __init__(self, tower: Any, max_bytes: int, layers: tuple[int, ...] = ()) -> None:
        """
        Args:
            tower: the policy's.
            max_bytes: of features, on the tower's device; the least recently used go first.
            layers: of a tower of tiles, the hidden states that the model takes; none: a tower with mergers.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is not valid: use 0 or more.")
        self.tower = tower
        self.max_bytes = max_bytes
        self.layers = layers
        self.bytes = 0
        self.hits = 0
        """Images found in the cache."""
        self.misses = 0
        """Images that went through the tower."""
        self._kept: OrderedDict[tuple[bytes, torch.dtype], Features] = OrderedDict()
        self._weights: Fingerprint = []
        self._compared: tuple[Fingerprint, Fingerprint] | None = None
        self._is_same = False

    def clear(self) -> None:
        """Empties the cache."""
        self._kept.clear()
        self.bytes = 0

    @property
    def room(self) -> int:
        """Bytes that the cache may still grow by; 0 while the tower trains."""
        return self.max_bytes - self.bytes if self._covers(self.tower) else 0

    @contextmanager
    def serving(self, tower: Any, digests: Sequence[bytes], sizes: Sequence[int]) -> Iterator[None]:
        """Within this context, a call of `tower` runs only the pictures that are not in the cache.

        Args:
            tower: the cache's own, or a copy of it such as the frozen reference's; its own mergers are used.
            digests: one per picture of the next call, in order (`Prompt.image_digests`).
            sizes: how many rows of the call's `pixel_values` each has. If either does not fit the call, the cache is
                not used.
        """
        if not self._covers(tower):
            yield
            return
        run = tower.forward

        def forward(pixel_values: Tensor, **options: Any) -> Any:
            if len(digests) != len(sizes) or sum(sizes) != len(pixel_values):
                return run(pixel_values, **options)
            device = pixel_values.device.type
            precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tower.dtype
            keys = [(digest, precision) for digest in digests]
            missing = {key: i for i, key in enumerate(keys) if key not in self._kept}
            features = {key: self._kept[key] for key in keys if key not in missing}
            if missing:
                chosen = list(missing.values())
                pixels, some = _of_some(pixel_values, options, sizes, chosen)
                with torch.no_grad():
                    seen = self._tiles(run, pixels, some) if self.layers else _patches(tower, run, pixels, some)
                counts = [sizes[i] * len(seen[0]) // len(pixels) for i in chosen]
                # Each is a copy: a view would hold the memory of all of them.
                parts = [[part.clone() for part in whole.split(counts)] for whole in seen]
                features |= zip(missing, zip(*parts, strict=True), strict=True)
            self._keep(features)
            self.hits += len(keys) - len(missing)
            self.misses += len(missing)
            return self._output(tower, [torch.cat(parts) for parts in zip(*(features[k] for k in keys), strict=True)])

        with replaced_forward(tower, forward):
            yield

    def _tiles(self, run: Callable[..., Any], pixel_values: Tensor, options: dict[str, Any]) -> list[Tensor]:
        output = run(pixel_values, **options)
        states = output.hidden_states
        return [output.last_hidden_state if states is None else states[layer] for layer in self.layers]

    def _output(self, tower: Any, features: list[Tensor]) -> Any:
        """What the tower returns, from the features of all pictures."""
        if self.layers:
            states: Any = dict(zip(self.layers, features, strict=True))
            return BaseModelOutputWithPooling(last_hidden_state=features[0], hidden_states=states)
        merged = [merger(part.flatten(0, 1)) for merger, part in zip(_mergers(tower), features, strict=True)]
        output: Any = BaseModelOutputWithPooling(pooler_output=merged[0])
        output.deepstack_features = merged[1:]
        return output

    def _keep(self, features: dict[tuple[bytes, torch.dtype], Features]) -> None:
        """Marks the features as just used, and drops the least recently used beyond `max_bytes`."""
        for key, value in features.items():
            if key not in self._kept:
                self.bytes += _bytes(value)
            self._kept[key] = value
            self._kept.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= _bytes(oldest)

    def _covers(self, tower: Any) -> bool:
        """Whether the cache is valid for `tower`; empties it if the weights of the cache's own tower have changed."""
        parameters = _tower_parameters(self.tower)
        if any(p.requires_grad or hasattr(p, "ds_id") for p in parameters.values()):
            return False
        # peft's adapters, which may be switched off
        if any("base_layer" in name or "modules_to_save" in name for name in parameters):
            return False
        weights = _fingerprint(parameters)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        if tower is self.tower:
            return True
        others = _tower_parameters(tower)
        compared = weights, _fingerprint(others)
        if compared != self._compared:
            self._compared = compared
            same_names = parameters.keys() == others.keys()
            self._is_same = same_names and all(_equal(p, others[name]) for name, p in parameters.items())
        return self._is_same


def _bytes(features: Features) -> int:
    return sum(part.nbytes for part in features)


def _of_some(
    pixel_values: Tensor, options: dict[str, Any], sizes: Sequence[int], chosen: list[int]
) -> tuple[Tensor, dict[str, Any]]:
    """A call's arguments for the chosen pictures: tensors with a row for each picture, or for each of its rows."""

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if len(value) != len(pixel_values):
            return value[chosen]
        rows = value.split(list(sizes))
        return torch.cat([rows[i] for i in chosen])

    return part(pixel_values), {name: part(value) for name, value in options.items()}


def _mergers(tower: Any) -> list[Any]:
    """The last one, then those of the layers whose features go to the language model's first layers (Qwen3-VL)."""
    return [tower.merger, *getattr(tower, "deepstack_merger_list", ())]


def _patches(tower: Any, run: Callable[..., Any], pixel_values: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """What each merger is given, [image tokens, patches of one, dim]."""
    tokens = len(pixel_values) // tower.spatial_merge_size**2

    def grouped(patches: Tensor) -> Tensor:
        """One row per row of a merger's output: Qwen2.5-VL's tower reorders those into the image's order."""
        return patches.reshape(tokens, -1, patches.shape[-1])

    with ExitStack() as stack:
        for merger in _mergers(tower):
            stack.enter_context(replaced_forward(merger, grouped))
        output = run(pixel_values, **options)
    return [output.pooler_output, *getattr(output, "deepstack_features", ())]


def _tower_parameters(tower: Any) -> dict[str, nn.Parameter]:
    """Parameters in front of the mergers, by name."""
    return {name: p for name, p in tower.named_parameters() if "merger" not in name.split(".")[0]}


def _fingerprint(parameters: dict[str, nn.Parameter]) -> Fingerprint:
    """Changes when parameters are loaded. Nothing is read from the device; 0.5 ms for a tower of 32 blocks."""
    return [(p.data_ptr(), p._version) for p in parameters.values()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)
