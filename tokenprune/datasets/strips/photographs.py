"""Street photographs with their garments in everyday words: Clothing Co-Parsing (Yang et al., CVPR 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.datasets.files.annotation_files import json_of
from tokenprune.datasets.files.index_cache import Index
from tokenprune.datasets.strips.colours import colour_shares
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown

COUNT = 1004
"""Photographs that have labels for pixels; their numbers are 1 to 1004."""
SPLITS = ("train", "val", "test")
HEIGHT, WIDTH = 320, 224  # of one photograph in a strip

GARMENTS = {
    "bag": ("bag", "purse", "wallet"),
    "belt": ("belt",),
    "jacket": ("blazer", "jacket"),
    "coat": ("coat", "cape"),
    "top": ("blouse", "bodysuit", "shirt", "t-shirt", "top"),
    "sweater": ("cardigan", "hoodie", "jumper", "sweater", "sweatshirt"),
    "dress": ("dress",),
    "romper": ("romper",),
    "skirt": ("skirt",),
    "shorts": ("shorts",),
    "trousers": ("pants",),
    "jeans": ("jeans",),
    "tights": ("leggings", "stockings", "tights"),
    "boots": ("boots",),
    "shoes": ("clogs", "flats", "heels", "loafers", "pumps", "sandals", "shoes", "sneakers", "wedges"),
    "socks": ("socks",),
    "hat": ("hat",),
    "glasses": ("glasses", "sunglasses"),
    "scarf": ("scarf",),
    "vest": ("vest",),
    "suit": ("suit",),
    "tie": ("tie",),
    "gloves": ("gloves",),
}
"""The dataset's 59 names, merged where photographs this small do not tell them apart; the others are not asked for."""

NAMES = tuple(GARMENTS)
SMALL = {"belt", "socks", "glasses", "tie", "gloves"}
AGAIN = "prepare the folder with tools/prepare_clothing.py, see docs/datasets.md"


@dataclass(frozen=True)
class View:
    """One photograph as a strip shows it.

    Args:
        number: of the photograph.
        pixels: uint8 [HEIGHT, WIDTH, 3].
        labels: uint8 [HEIGHT, WIDTH]: 0 background, 1 + index into NAMES for a garment, 255 for the rest of the person.
        colours: by garment, the share of each colour word in the untouched photograph.
    """

    number: int
    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    colours: dict[str, dict[str, float]]

    @cached_property
    def pixels_of(self) -> dict[str, int]:
        """How many pixels of each garment are seen."""
        counts = np.bincount(self.labels.ravel(), minlength=256)
        return {name: int(counts[number + 1]) for number, name in enumerate(NAMES)}

    def wears(self, garment: str) -> bool | None:
        """Whether the person wears it; None where too little of it is seen to say."""
        seen = self.pixels_of[garment]
        if seen == 0:
            return False
        return True if seen >= (60 if garment in SMALL else 180) else None

    def wears_in(self, colour: str, garment: str) -> bool | None:
        """Whether the person wears one of that colour: most of it is, or hardly any."""
        wears = self.wears(garment)
        if not wears:
            return wears
        share = self.colours.get(garment, {}).get(colour, 0.0)
        return True if share >= 0.5 else False if share < 0.12 else None

    def colour_of(self, garment: str) -> str | None:
        """The colour that most of a garment has."""
        found = [word for word, share in self.colours.get(garment, {}).items() if share >= 0.5]
        return found[0] if found else None


class Photographs:
    """The photographs of one split; the splits are fixed, whatever the seed of a dataset.

    Args:
        folder: `photos/NNNN.jpg`, `labels/NNNN.png` (a number of `labels.json` a pixel) and `labels.json` (the 59 names
            in their order).
        split: "train" (724 photographs), "val" (80) or "test" (200).

    Raises:
        InputError: a file is missing, there is a photograph too many, or labels.json is not a list of the names.

    Attributes:
        numbers: of the photographs, in the order in which strips are drawn from them.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self._table, self._names = _table(folder / "labels.json")
        _check_complete(folder)
        order = np.random.default_rng(20261201).permutation(np.arange(1, COUNT + 1)).tolist()
        self.numbers: list[int] = {"test": order[:200], "val": order[200:280], "train": order[280:]}[split]

    @cached_property
    def colours(self) -> dict[int, dict[str, dict[str, float]]]:
        """By photograph and garment, the share of each colour word; computed once and kept in the cache folder."""
        files = [file for number in self.numbers for file in self._files(number)]
        kept = Index("photo-strips-1", [self.folder / "labels.json", *files], self._facts)
        return {int(number): found for number, found in kept.part("colours").items()}

    def _facts(self) -> dict[str, Any]:
        return {"colours": {str(number): self._colours_of(number) for number in self.numbers}}

    def _colours_of(self, number: int) -> dict[str, dict[str, float]]:
        photo, labels = (np.array(part) for part in self.read(number))
        found = {}
        for index, name in enumerate(NAMES):
            pixels = photo[labels == index + 1]
            if len(pixels) >= 20:
                shares = colour_shares(pixels[:: max(len(pixels) // 600, 1)])
                found[name] = {word: round(share, 3) for word, share in shares.items() if share > 0.02}
        return found

    def _files(self, number: int) -> tuple[Path, Path]:
        return self.folder / "photos" / f"{number:04d}.jpg", self.folder / "labels" / f"{number:04d}.png"

    def read(self, number: int) -> tuple[Image.Image, Image.Image]:
        """A photograph, and its labels as in `View.labels`, in the size of the files.

        Raises:
            InputError: a file cannot be read, the sizes differ, or a label has no name.
        """
        from tokenprune.utils.images import to_rgb  # imports torch, which refusals do without

        photo, file = self._files(number)
        picture, labels = to_rgb(photo), _labels(file)
        if labels.shape != picture.size[::-1]:
            found, wanted = f"{labels.shape[1]}×{labels.shape[0]}", f"{picture.width}×{picture.height}"
            raise InputError(f"{str(file)!r} is {found}, expected {wanted}, the size of its photograph; {AGAIN}")
        if labels.max() >= self._names:
            held = f"{str(file)!r} has the label {labels.max()}"
            raise InputError(f"{held}, expected numbers of the {self._names} names of labels.json; {AGAIN}")
        return picture, Image.fromarray(self._table[labels])

    def view(self, number: int, rng: np.random.Generator | None = None) -> View:
        """The photograph cut to the strip's shape around its middle; with `rng` flipped, cut and tinted by chance."""
        photo, labels = self.read(number)
        box = _box(photo.size, rng)
        pixels = photo.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box)
        seen = np.array(labels.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST, box))
        values = np.array(pixels)
        if rng is not None:
            if rng.random() < 0.5:
                values, seen = values[:, ::-1], seen[:, ::-1]
            values = _tinted(values, rng)
        return View(number, np.ascontiguousarray(values), np.ascontiguousarray(seen), self.colours[number])


def _table(file: Path) -> tuple[NDArray[np.uint8], int]:
    """From a number of labels.json to one of `View.labels`, uint8 [256]; and how many names there are."""
    raw = json_of(file)
    if not isinstance(raw, list) or not raw or len(raw) > 256 or not all(isinstance(name, str) for name in raw):
        raise InputError(f"{str(file)!r} is {shown(raw)}, expected a list of names of labels; {AGAIN}")
    table = np.full(256, 255, dtype=np.uint8)
    table[0] = 0
    for number, merged in enumerate(GARMENTS.values()):
        for name in merged:
            if name not in raw:
                raise InputError(f"{str(file)!r} has no label {name!r}, expected the 59 names; {AGAIN}")
            table[raw.index(name)] = number + 1
    return table, len(raw)


def _check_complete(folder: Path) -> None:
    """Refuse other photographs than those that the splits are made of: strips of them would be others."""
    for name, ending in (("photos", "jpg"), ("labels", "png")):
        found = {file.name for file in (folder / name).glob(f"*.{ending}")}
        wanted = {f"{number:04d}.{ending}" for number in range(1, COUNT + 1)}
        if found != wanted:
            odd = min(wanted - found or found - wanted)
            held = f"lacks {odd!r}" if odd in wanted else f"has {odd!r} too"
            raise InputError(
                f"{str(folder / name)!r} {held}, expected 0001.{ending} … {COUNT:04d}.{ending}, {COUNT} files; {AGAIN}"
            )


def _labels(file: Path) -> NDArray[np.uint8]:
    """uint8 [H, W]: the numbers in a file of labels."""
    try:
        with Image.open(file) as opened:
            if opened.mode not in ("L", "P"):
                raise InputError(f"{str(file)!r} is of mode {opened.mode!r}, expected a number a pixel; {AGAIN}")
            return np.array(opened)
    except InputError:
        raise
    except Exception as error:  # what PIL raises on a damaged file differs
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{str(file)!r} cannot be read ({why}); {AGAIN}") from error


def _box(size: tuple[int, int], rng: np.random.Generator | None) -> tuple[float, float, float, float]:
    """The part of a photograph to show, (left, top, right, bottom)."""
    width, height = size
    shape = WIDTH / HEIGHT
    zoom, x, y = 1.0, 0.5, 0.5
    if rng is not None:
        zoom, x, y = rng.uniform(0.85, 1.0), rng.uniform(), rng.uniform()
        shape *= float(np.exp(rng.uniform(-0.12, 0.12)))
    w = zoom * min(width, height * shape)
    h = w / shape
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h


def _tinted(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brightness, contrast, saturation and white balance changed so little that colour words stay true."""
    x = pixels.astype(np.float32) / 255
    x = x ** float(np.exp(rng.uniform(-0.25, 0.25)))
    gray = x.mean(-1, keepdims=True)
    x = gray + rng.uniform(0.75, 1.25) * (x - gray)
    x = x.mean() + rng.uniform(0.8, 1.2) * (x - x.mean())
    x = x * rng.uniform(0.93, 1.07, 3).astype(np.float32)
    if rng.random() < 0.3:
        x = x + rng.normal(0, 0.02, x.shape).astype(np.float32)
    changed: NDArray[np.uint8] = (x.clip(0, 1) * 255).astype(np.uint8)
    return changed
