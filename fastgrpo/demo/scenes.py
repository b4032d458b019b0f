"""Synthetic pictures with spatial questions, in the schemas of SAT (training) and CV-Bench (held out).

Row i depends on (seed, split, i) alone. Every picture shows a plain under a sky: colour changes from top to bottom,
light comes from the left, and objects nearer the camera are lower in the picture and larger.

The gold answer is drawn uniformly from the options, and then the scene is laid out to fit it. So the question's words,
colours and options carry no information about the answer: without the right picture no policy beats chance.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

Kind = Literal["count", "left_right", "above_below", "depth", "distance"]
Split = Literal["train", "heldout"]

KINDS: tuple[Kind, ...] = ("count", "left_right", "above_below", "depth", "distance")
CVBENCH_TASKS: dict[Kind, str] = {
    "count": "Count",
    "left_right": "Relation",
    "above_below": "Relation",
    "depth": "Depth",
    "distance": "Distance",
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "blue": (35, 50, 225),
    "green": (20, 165, 60),
    "yellow": (245, 225, 30),
    "purple": (165, 40, 185),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = (1, 2, 3, 4)
MIN_GAP = 0.3
"""Smallest distance along the axis that a question asks about, as a fraction of the picture's side."""

_SAME_SENTENCE = (
    "Considering the relative positions of the {a} and the {b} in the image, "
    "where is the {a} located with respect to the {b}?"
)
WORDINGS: dict[Kind, tuple[str, ...]] = {
    "count": (
        "How many {things} are in the image?",
        "Count the {things} in the picture. How many are there?",
        "What is the number of {things} that you can see?",
    ),
    "left_right": (
        _SAME_SENTENCE,
        "Is the {a} to the left or to the right of the {b}?",
        "On which side of the {b} is the {a}?",
    ),
    "above_below": (
        _SAME_SENTENCE,
        "Is the {a} above or below the {b} in the picture?",
        "Relative to the {b}, is the {a} higher up or lower down?",
    ),
    "depth": (
        "Is the {a} nearer to the camera taking this photo than the {b}, or farther from it?",
        "Compared with the {b}, is the {a} nearer to the viewer or farther away?",
        "From the camera's place, is the {a} farther away or nearer than the {b}?",
    ),
    "distance": (
        "Which object is closer to the {c}, the {a} or the {b}?",
        "Estimate the distances between the objects in the image. Which is nearest to the {c}, the {a} or the {b}?",
        "Is it the {a} or the {b} that lies nearer to the {c}?",
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape. `x`, `y` (its centre) and `radius` are fractions of the picture; y grows downwards."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class SceneQuestion:
    """A question with its options in a seeded order, and the scene that decides it."""

    kind: Kind
    split: Split
    index: int
    wording: int
    """Position in `WORDINGS[kind]`."""
    question: str
    choices: tuple[str, ...]
    answer: str
    width: int
    height: int
    objects: tuple[SceneObject, ...]
    subjects: tuple[SceneObject, ...]
    """The objects the question names, in the order a, b, c; for a count, the ones counted."""
    pixel_seed: int


def scene_question(
    seed: int, index: int, *, split: Split = "train", kinds: Sequence[Kind] = KINDS, image_size: int = 112
) -> SceneQuestion:
    """Question `index` of a split. Sides are `image_size` ± 18 %. ValueError for an unknown kind or split."""
    _check(seed, split, kinds, image_size)
    rng = np.random.default_rng([seed, index, 0 if split == "train" else 1])
    kind = kinds[int(rng.integers(len(kinds)))]
    spread = round(image_size * 0.18)
    width, height = (int(side) for side in rng.integers(image_size - spread, image_size + spread + 1, size=2))
    wording = int(rng.integers(len(WORDINGS[kind])))
    words, choices, answer, objects, subjects = _LAYOUTS[kind](rng)
    order = rng.permutation(len(choices))
    return SceneQuestion(
        kind=kind,
        split=split,
        index=index,
        wording=wording,
        question=WORDINGS[kind][wording].format(**words),
        choices=tuple(choices[i] for i in order),
        answer=answer,
        width=width,
        height=height,
        objects=tuple(objects[i] for i in rng.permutation(len(objects))),
        subjects=tuple(subjects),
        pixel_seed=int(rng.integers(2**31)),
    )


def _check(seed: int, split: str, kinds: Sequence[str], image_size: int) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds={list(kinds)!r}: choose one or more of {', '.join(KINDS)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}: choose 'train' or 'heldout'")
    if seed < 0:
        raise ValueError(f"seed={seed}: give a seed of 0 or more")
    if image_size < 56:
        raise ValueError(f"image_size={image_size}: give at least 56 pixels")


Layout = tuple[dict[str, str], list[str], str, list[SceneObject], list[SceneObject]]
"""Words of the question, options, gold option, all objects, the objects asked about."""


def _choice(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _positions(rng: np.random.Generator, count: int, fits: Callable[[np.ndarray], bool] = lambda _: True) -> np.ndarray:
    """[count, 2] float64 centres that keep apart and satisfy `fits`, by rejection."""
    while True:
        centres = rng.uniform(0.12, 0.88, size=(count, 2))
        radii = _radius(centres[:, 1])
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        apart = gaps >= 1.15 * (radii[:, None] + radii[None])
        if (apart | np.eye(count, dtype=bool)).all() and fits(centres):
            return centres


def _radius(y: np.ndarray) -> np.ndarray:
    """Perspective: what stands lower is nearer, hence larger."""
    return 0.06 + 0.07 * y


def _place(rng: np.random.Generator, names: Sequence[tuple[str, str]], centres: np.ndarray) -> list[SceneObject]:
    radii = _radius(centres[:, 1]) * rng.uniform(0.92, 1.08, size=len(centres))
    return [
        SceneObject(colour, shape, float(x), float(y), float(radius))
        for (colour, shape), (x, y), radius in zip(names, centres, radii, strict=True)
    ]


def _distinct_names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    colours = list(COLOURS)
    return [(colours[i], _choice(rng, SHAPES)) for i in rng.permutation(len(colours))[:count]]


def _layout_count(rng: np.random.Generator) -> Layout:
    gold = COUNTS[int(rng.integers(len(COUNTS)))]
    target_colour = _choice(rng, list(COLOURS)) if rng.random() < 0.5 else None
    others = int(rng.integers(3)) if target_colour else 0
    names = [(target_colour or _choice(rng, list(COLOURS)), _choice(rng, SHAPES)) for _ in range(gold)]
    rest = [colour for colour in COLOURS if colour != target_colour]
    names += [(_choice(rng, rest), _choice(rng, SHAPES)) for _ in range(others)]
    objects = _place(rng, names, _positions(rng, len(names)))
    things = f"{target_colour} objects" if target_colour else "objects"
    return {"things": things}, [str(count) for count in COUNTS], str(gold), objects, objects[:gold]


def _layout_relation(rng: np.random.Generator, axis: int, choices: tuple[str, str]) -> Layout:
    """Axis 0 (left, right) or 1 (above, below): where is a, seen from b?"""
    gold = int(rng.integers(2))
    names = _distinct_names(rng, 2 + int(rng.integers(3)))
    sign = 1 if gold == 0 else -1
    centres = _positions(rng, len(names), lambda c: sign * (c[1, axis] - c[0, axis]) >= MIN_GAP)
    objects = _place(rng, names, centres)
    words = {"a": objects[0].name, "b": objects[1].name}
    return words, list(choices), choices[gold], objects, objects[:2]


def _layout_distance(rng: np.random.Generator) -> Layout:
    gold = int(rng.integers(2))
    names = _distinct_names(rng, 3 + int(rng.integers(3)))

    def gold_is_nearer(centres: np.ndarray) -> bool:
        to_c = np.linalg.norm(centres[:2] - centres[2], axis=-1)
        return bool(to_c[1 - gold] - to_c[gold] >= MIN_GAP)

    objects = _place(rng, names, _positions(rng, len(names), gold_is_nearer))
    choices = [objects[0].name, objects[1].name]
    return dict(zip("abc", [*choices, objects[2].name], strict=True)), choices, choices[gold], objects, objects[:3]


_LAYOUTS: dict[Kind, Callable[[np.random.Generator], Layout]] = {
    "count": _layout_count,
    "left_right": lambda rng: _layout_relation(rng, 0, ("left", "right")),
    "above_below": lambda rng: _layout_relation(rng, 1, ("above", "below")),
    "depth": lambda rng: _layout_relation(rng, 1, ("farther", "nearer")),  # what stands lower is nearer
    "distance": _layout_distance,
}


@lru_cache(maxsize=4096)
def _background(width: int, height: int) -> np.ndarray:
    """[height, width, 3] float32: sky to ground from top to bottom, lit from the left."""
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky, ground = np.array([105, 160, 235], np.float32), np.array([215, 150, 70], np.float32)
    light = np.linspace(1.08, 0.35, width, dtype=np.float32)[None, :, None]
    return ((1 - down) * sky + down * ground) * light


def render(question: SceneQuestion) -> Image.Image:
    """The picture, RGB. The low bit of its first pixel is the split, so no picture belongs to both."""
    rng = np.random.default_rng(question.pixel_seed)
    width, height = question.width, question.height
    grain = rng.integers(-6, 7, size=(height, width, 1), dtype=np.int8)
    pixels = np.clip(_background(width, height) + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for x, y, shade in rng.random((int(rng.integers(4, 12)), 3)):  # pebbles
        grey = int(60 + 100 * shade)
        draw.point((int(x * width), int(y * height)), fill=(grey, grey, grey))
    for thing in sorted(question.objects, key=lambda thing: thing.y):
        _draw_object(draw, thing, width, height)
    red, green, blue = np.asarray(image)[0, 0].tolist()
    image.putpixel((0, 0), (red, green, blue & ~1 | (question.split == "heldout")))
    return image


def _draw_object(draw: ImageDraw.ImageDraw, thing: SceneObject, width: int, height: int) -> None:
    left, top, right, bottom = box = _box(thing, width, height)
    fill, outline = COLOURS[thing.colour], (15, 15, 15)
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill, outline=outline)
    elif thing.shape == "square":
        draw.rectangle(box, fill=fill, outline=outline)
    else:
        draw.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=fill, outline=outline)


def _box(thing: SceneObject, width: int, height: int) -> tuple[float, float, float, float]:
    x, y, radius = thing.x * width, thing.y * height, thing.radius * min(width, height)
    return x - radius, y - radius, x + radius, y + radius


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def sat_row(question: SceneQuestion, image: Image.Image | None = None) -> dict[str, Any]:
    """SAT's columns. As there, the gold answer comes first in `answers`: the reader shuffles.

    An `image` given stands in the row as it is, which saves coding and decoding where no file is written.
    """
    others = [choice for choice in question.choices if choice != question.answer]
    return {
        "image_bytes": [image or _png(render(question))],
        "question": question.question,
        "answers": [question.answer, *others],
        "question_type": question.kind,
        "correct_answer": question.answer,
    }


def letter(position: int) -> str:
    """Option 0 is "(A)", option 1 is "(B)"."""
    return f"({chr(ord('A') + position)})"


def cvbench_prompt(question: str, choices: Sequence[str]) -> str:
    """A question with lettered choices, worded as in CV-Bench's `prompt` column."""
    lines = [f"{letter(position)} {choice}" for position, choice in enumerate(choices)]
    return "\n".join([f"{question} Select from the following choices.", *lines])


def cvbench_row(question: SceneQuestion, image: Image.Image | None = None) -> dict[str, Any]:
    """CV-Bench's columns; `image` is the {bytes, path} struct of the hub's image feature, boxes are xyxy pixels.

    An `image` given stands in the row as it is, as in `sat_row`.
    """
    filename = f"{question.split}_{question.index:08d}.png"
    boxes = [[round(side, 1) for side in _box(thing, question.width, question.height)] for thing in question.subjects]
    return {
        "idx": question.index,
        "type": "3D" if question.kind in ("depth", "distance") else "2D",
        "task": CVBENCH_TASKS[question.kind],
        "image": image or {"bytes": _png(render(question)), "path": filename},
        "question": question.question,
        "choices": list(question.choices),
        "answer": letter(question.choices.index(question.answer)),
        "prompt": cvbench_prompt(question.question, question.choices),
        "filename": filename,
        "source": "synthetic",
        "source_dataset": "fastgrpo scenes",
        "source_filename": filename,
        "target_class": question.kind,
        "target_size": len(question.subjects),
        "bbox": boxes,
    }


class SyntheticScenes:
    """The endless stream of one split: `scenes[i]` is row i in SAT's schema, iteration never ends."""

    def __init__(
        self, seed: int, *, kinds: Sequence[Kind] = KINDS, image_size: int = 112, split: Split = "train"
    ) -> None:
        _check(seed, split, kinds, image_size)
        self.seed, self.kinds, self.image_size, self.split = seed, tuple(kinds), image_size, split

    def question(self, index: int) -> SceneQuestion:
        return scene_question(self.seed, index, split=self.split, kinds=self.kinds, image_size=self.image_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sat_row(self.question(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in itertools.count())


SAT_SCHEMA = pa.schema(
    [
        ("image_bytes", pa.list_(pa.binary())),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("question_type", pa.string()),
        ("correct_answer", pa.string()),
    ]
)
_CVBENCH_COLUMNS = (
    "idx type task image question choices answer prompt filename source source_dataset source_filename target_class "
    "target_size bbox"
)
_CVBENCH_TYPES = {
    "idx": pa.int64(),
    "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "choices": pa.list_(pa.string()),
    "target_size": pa.int64(),
    "bbox": pa.list_(pa.list_(pa.float64())),
}
CVBENCH_SCHEMA = pa.schema([(name, _CVBENCH_TYPES.get(name, pa.string())) for name in _CVBENCH_COLUMNS.split()])


def write_sat_parquet(
    path: str | Path, count: int, seed: int, *, kinds: Sequence[Kind] = KINDS, image_size: int = 112
) -> None:
    """Writes training rows 0 … count-1 in SAT's schema."""
    scenes = SyntheticScenes(seed, kinds=kinds, image_size=image_size)
    rows = [scenes[index] for index in range(count)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SAT_SCHEMA), path)


def write_cvbench_parquet(
    path: str | Path, count: int, seed: int, *, kinds: Sequence[Kind] = KINDS, image_size: int = 112
) -> None:
    """Writes held-out rows 0 … count-1 in CV-Bench's schema."""
    scenes = SyntheticScenes(seed, kinds=kinds, image_size=image_size, split="heldout")
    rows = [cvbench_row(scenes.question(index)) for index in range(count)]
    pq.write_table(pa.Table.from_pylist(rows, schema=CVBENCH_SCHEMA), path)
