"""Styles of taking pictures: what an image processor returns, how it stands in a prompt, what a model is handed.

A picture has a row of three numbers in `Prompt.image_grid_thw`; each style says what they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from fastgrpo.types import RowError


def _processed(processor: Any, images: Sequence[Any], *names: str, **options: Any) -> list[Any]:
    """`pixel_values` and other features of pictures."""
    features = processor(images=images, return_tensors="pt", **options)
    if lacking := [name for name in names if name not in features]:
        raise ValueError(
            f"the image processor, a {type(processor).__name__}, gives no {lacking[0]}: use the model's own"
        )
    return [features["pixel_values"], *(features[name] for name in names)]


@dataclass(frozen=True)
class Grids:
    """A picture is a grid of patches, whose squares are merged into a placeholder each (Qwen2-VL). Its row: (frames,
    rows, columns) of patches; `pixel_values` is [patches, patch_dim]."""

    tokens: tuple[str, ...] = ()

    def of(self, config: Any) -> "Grids":
        """The style of a model with this config."""
        return self

    def process(self, processor: Any, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """`pixel_values` and rows of the pictures of a prompt, by a transformers image processor."""
        pixels, grids = _processed(processor, list(images), "image_grid_thw")
        return pixels, grids

    def sizes(self, grids: Tensor) -> list[int]:
        """How many entries of `pixel_values` each picture has."""
        sizes: list[int] = grids.prod(dim=1).tolist()
        return sizes

    def places(self, grids: Tensor, merge_size: int) -> list[int]:
        """How often each placeholder of the written-out text is repeated."""
        return [size // merge_size**2 for size in self.sizes(grids)]

    def written_out(self, text: str, token: str, grids: Tensor) -> str:
        """A prompt with one placeholder a picture → the text to tokenize."""
        return text

    def inputs(self, pixels: Tensor, grids: Tensor) -> dict[str, Any]:
        """Arguments of the model's forward pass."""
        return {"pixel_values": pixels, "image_grid_thw": grids}


@dataclass(frozen=True)
class Tiles(Grids):
    """A picture is cut into tiles of equally many placeholders (LLaVA, InternVL, Gemma 3). Its row: (tiles, 1, 1);
    `pixel_values` is [tiles, 3, H, W]."""

    length: str = "image_seq_length"
    """Name of the placeholders of a tile in the config."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the joint processor asks of the image processor."""
    config: Any = None
    """Of the model."""

    def of(self, config: Any) -> "Tiles":
        return replace(self, config=config)

    @property
    def per_tile(self) -> int:
        """Placeholders of a tile."""
        places: int = getattr(self.config, self.length)
        return places

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of the tower that the model takes; −1, its last, where it does not say."""
        chosen = getattr(self.config, "vision_feature_layer", -1)
        return (chosen,) if isinstance(chosen, int) else tuple(chosen)

    @property
    def tile_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        vision = self.config.vision_config
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(vision, "num_channels", 3), height, width

    def process(self, processor: Any, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        features = processor(images=list(images), return_tensors="pt", **self.options)
        counts = torch.as_tensor(features.get("num_patches", [1] * len(images)))
        return features["pixel_values"], torch.stack([counts, *[torch.ones_like(counts)] * 2], dim=1)

    def sizes(self, grids: Tensor) -> list[int]:
        sizes: list[int] = grids[:, 0].tolist()
        return sizes

    def places(self, grids: Tensor, merge_size: int) -> list[int]:
        return [self.per_tile * size for size in self.sizes(grids)]

    def inputs(self, pixels: Tensor, grids: Tensor) -> dict[str, Any]:
        return {"pixel_values": pixels}

    def smallest(self) -> Tensor:
        """[1, 3], the row of a picture of few tiles."""
        return torch.ones(1, 3, dtype=torch.int64)


@dataclass(frozen=True)
class SplitTiles(Tiles):
    """The text names the row and column of every tile; the whole picture comes last (Idefics3, SmolVLM). The row of a
    picture: (tiles, rows, columns); 0 rows and columns where the whole picture is the only tile."""

    tokens: tuple[str, ...] = ("<fake_token_around_image>", "<global-img>")

    def smallest(self) -> Tensor:
        return torch.tensor([[1, 0, 0]])

    @property
    def per_tile(self) -> int:
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2)

    def process(self, processor: Any, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        pixels, *sides = _processed(processor, list(images), "rows", "cols", return_row_col_info=True)
        rows, columns = (torch.tensor(side[0]) for side in sides)
        return pixels[0], torch.stack([rows * columns + 1, rows, columns], dim=1)

    def places(self, grids: Tensor, merge_size: int) -> list[int]:
        return [self.per_tile] * sum(self.sizes(grids))

    def written_out(self, text: str, token: str, grids: Tensor) -> str:
        first, *others = text.split(token)
        if len(others) != len(grids):
            raise RowError(f"the prompt has {len(others)} image places for {len(grids)} images")
        places = [self._place(token, rows, columns) for _, rows, columns in grids.tolist()]
        return first + "".join(place + text for place, text in zip(places, others, strict=True))

    def _place(self, token: str, rows: int, columns: int) -> str:
        edge, whole = self.tokens
        lines = [
            "".join(f"{edge}<row_{row + 1}_col_{column + 1}>{token}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join([*lines, "\n" if lines else "", edge, whole, token, edge])

    def inputs(self, pixels: Tensor, grids: Tensor) -> dict[str, Any]:
        return {"pixel_values": pixels[None]}


@dataclass(frozen=True)
class BestResolution(Tiles):
    """The whole picture as a tile, then its tiles at the best of given resolutions, without what pads them; a vector
    ends each line (LLaVA-NeXT, arXiv 2408.03326 for OneVision). Its row: (tiles, height, width), of the picture in
    pixels."""

    whole_among_others: bool = False
    """Whether each of several pictures of a prompt is one tile (OneVision)."""

    @property
    def _side(self) -> int:
        """Placeholders along a tile's side."""
        return int(self.config.vision_config.image_size // self.config.vision_config.patch_size)

    @property
    def per_tile(self) -> int:
        return self._side**2

    def process(self, processor: Any, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        found, sizes = _processed(processor, [list(images)], "image_sizes")
        sizes = torch.as_tensor(sizes)  # [images, 2]
        whole = self.whole_among_others and len(images) > 1
        counts = [1 if whole else math.prod(self._cells(*size)) + 1 for size in sizes.tolist()]
        pixels = torch.cat([tiles[:count] for tiles, count in zip(found, counts, strict=True)])
        return pixels, torch.cat([torch.tensor(counts)[:, None], sizes], dim=1)

    def _cells(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        _, tile_height, tile_width = self.tile_size
        best = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        return best[0] // tile_height, best[1] // tile_width

    def places(self, grids: Tensor, merge_size: int) -> list[int]:
        return [self._places(*grid) for grid in grids.tolist()]

    def _places(self, tiles: int, height: int, width: int) -> int:
        """As transformers' models do it, `unpad_image` and `pack_image_features`."""
        if tiles == 1:
            return self.per_tile + 1
        rows, columns = (cells * self._side for cells in self._cells(height, width))
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        if limit := getattr(self.config, "vision_aspect_ratio", None):  # such as anyres_max_9
            ratio = math.sqrt(rows * columns / (int(limit.rsplit("_", 1)[1]) * self.per_tile))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return self.per_tile + rows * (columns + 1)

    def inputs(self, pixels: Tensor, grids: Tensor) -> dict[str, Any]:
        inputs = {"pixel_values": pixels, "image_sizes": grids[:, 1:]}
        if not self.whole_among_others:
            return inputs
        counts = []  # pictures of a prompt: only whether it is one counts
        for alone, run in groupby(count > 1 for count in self.sizes(grids)):
            length = len(list(run))
            counts += [1] * length if alone else [length]
        return inputs | {"batch_num_images": counts}

    def smallest(self) -> Tensor:
        height, width = min(self.config.image_grid_pinpoints, key=math.prod)
        return torch.tensor([[math.prod(self._cells(height, width)) + 1, height, width]])
