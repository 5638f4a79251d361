"""Pictures with queries and the masks that answer them: strips of street photographs, and natural pictures of COCO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokenprune.datasets.files.places import place_queries
from tokenprune.datasets.files.segmentation import drawn
from tokenprune.datasets.strips import strip
from tokenprune.datasets.strips.colours import COLOURS
from tokenprune.datasets.strips.photographs import NAMES, SMALL, WIDTH
from tokenprune_adapters.photos.model import CELLS, fitted
from tokenprune_adapters.photos.tower import STRIDE

CLASSES = (*NAMES, "person", "background")


@dataclass(frozen=True)
class Asked:
    """A query and its answer.

    Args:
        text: the query.
        target: bool [H, W], the thing's mask.
        focus: float [h, w], how much of each cell shows what the query names (of the thing, where it names no part).
        kind: what kind of query.
        unseen: whether its wording or its words are never trained.
    """

    text: str
    target: np.ndarray
    focus: np.ndarray
    kind: str
    unseen: bool


@dataclass(frozen=True)
class Scene:
    """A picture, its queries, and what its cells show where that is known.

    Args:
        pixels: uint8 [H, W, 3], sides multiples of 32.
        asked: the queries.
        classes, colours: int64 [h, w], indices into CLASSES and COLOURS, -1 where unknown.
    """

    pixels: np.ndarray
    asked: list[Asked]
    classes: np.ndarray
    colours: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.pixels.shape[0] // STRIDE, self.pixels.shape[1] // STRIDE


def coverage(mask: np.ndarray) -> np.ndarray:
    """The share of each cell that a mask [H, W] covers, float32 [h, w]."""
    h, w = mask.shape[0] // STRIDE, mask.shape[1] // STRIDE
    return mask.reshape(h, STRIDE, w, STRIDE).mean((1, 3), dtype=np.float32)


class Strips(strip.Strips):
    """Strips as scenes."""

    def scene(self, rng: np.random.Generator, count: int, varied: bool) -> Scene:
        """A strip, see `draw`, with what its cells show."""
        return of_strip(self.draw(rng, count, varied))


def of_strip(shown: strip.Strip) -> Scene:
    """The scene of a strip."""
    labels = shown.labels
    asked = []
    for query in shown.queries:
        target = shown.person(query.person)
        named = np.isin(labels, [NAMES.index(name) + 1 for name in query.garments]) & target
        focus = coverage(named if query.garments else target)
        asked.append(Asked(query.text, target, focus, query.kind, query.unseen))
    shares = np.stack([coverage(labels == number + 1) for number in range(len(NAMES))])
    shares[[NAMES.index(name) for name in SMALL]] *= 3  # a small garment is its cell's name
    whole = coverage(labels > 0)
    classes = np.where(shares.max(0) >= 0.15, shares.argmax(0), len(NAMES))
    classes = np.where(whole < 0.1, len(NAMES) + 1, classes)
    colours = np.full(classes.shape, -1)
    words = list(COLOURS)
    for place, view in enumerate(shown.views):
        columns = slice(place * WIDTH // STRIDE, (place + 1) * WIDTH // STRIDE)
        for number, name in enumerate(NAMES):
            colour = view.colour_of(name)
            if colour is not None:
                colours[:, columns][classes[:, columns] == number] = words.index(colour)
    return Scene(shown.pixels, asked, classes, colours)


@dataclass(frozen=True)
class Thing:
    """An instance: its class's name and its mask in the picture's original size."""

    name: str
    mask: np.ndarray


class Natural:
    """COCO pictures: a class of which there is one instance, or the one on a side or the biggest of a class.

    Args:
        folder: of COCO's pictures and annotations.
        split: "train2017" or "val2017".
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder / split
        about = json.loads((folder / f"instances_{split}.json").read_text())
        names = {category["id"]: category["name"] for category in about["categories"]}
        self.pictures = {image["id"]: image for image in about["images"]}
        self.things: dict[int, list[tuple[str, object]]] = {}
        for note in about["annotations"]:
            if not note.get("iscrowd"):
                self.things.setdefault(note["image_id"], []).append((names[note["category_id"]], note["segmentation"]))
        self.numbers = sorted(self.things)

    def read(self, number: int) -> tuple[Image.Image, list[Thing]]:
        """A picture and all its instances."""
        about = self.pictures[number]
        picture = Image.open(self.folder / about["file_name"]).convert("RGB")
        size = about["height"], about["width"]
        return picture, [Thing(name, drawn(shape, *size)) for name, shape in self.things[number]]

    def scene(self, rng: np.random.Generator, count: int, varied: bool, number: int | None = None) -> Scene:
        """A picture (drawn by chance, or the one given) with up to `count` queries; see `Strips.scene`."""
        while True:
            chosen = int(rng.choice(self.numbers)) if number is None else number
            picture, things = self.read(chosen)
            scene = _natural(rng, picture, things, count, varied)
            if scene.asked or number is not None:
                return scene


def _natural(rng: np.random.Generator, picture: Image.Image, things: list[Thing], count: int, varied: bool) -> Scene:
    width, height = picture.size
    box = (0.0, 0.0, float(width), float(height))
    cells = float(CELLS)
    if varied:
        zoom = rng.uniform(0.7, 1.0)
        left, top = rng.uniform(0, 1 - zoom) * width, rng.uniform(0, 1 - zoom) * height
        box = (left, top, left + zoom * width, top + zoom * height)
        cells *= rng.uniform(0.7, 1.1)
    flip = varied and rng.random() < 0.5
    columns, rows = fitted(width, height, cells)
    size = columns * STRIDE, rows * STRIDE
    turned = slice(None, None, -1 if flip else None)
    pixels = np.ascontiguousarray(np.array(picture.resize(size, Image.Resampling.BILINEAR, box))[:, turned])
    seen = []
    for thing in things:
        mask = np.array(Image.fromarray(thing.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR, box))
        seen.append(Thing(thing.name, np.ascontiguousarray(mask[:, turned] > 127)))
    unknown = np.full((rows, columns), -1)
    asked = []
    for name in sorted({thing.name for thing in seen}):
        group = [thing.mask for thing in seen if thing.name == name and thing.mask.any()]
        asked += [
            Asked(text, group[which], coverage(group[which]), kind, False)
            for text, which, kind in place_queries(name, group)
        ]
    order = rng.permutation(len(asked))[:count]
    return Scene(pixels, [asked[int(place)] for place in order], unknown, unknown)
